// Loaded pictures, the last used kept, so that the next pair is there before it is asked for.

const KEPT = 60;
const pictures = new Map();

export function picture(url) {
  let image = pictures.get(url);
  if (!image) {
    image = new Image();
    image.draggable = false;
    image.alt = "";
    image.addEventListener("error", () => pictures.delete(url));
    image.src = url;
  }
  pictures.delete(url);
  pictures.set(url, image);
  for (const oldest of pictures.keys()) {
    if (pictures.size <= KEPT) break;
    pictures.delete(oldest);
  }
  return image;
}
