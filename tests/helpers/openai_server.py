"""A real HTTP server on the loopback address that speaks the OpenAI API: well, badly, slowly, as it is told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class OpenAiServer:
    """Answers with what `answer` makes of a request's body, unless `answers` holds something else first.

    An answer is the content of a message, (status, content), or a function of the body that gives one of these.
    """

    def __init__(self, answer):
        self.requests, self.answers, self.headers, self.lock = [], [], [], threading.Lock()
        server, answer_all = self, answer

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.requests.append((self.path, body))
                    server.headers.append(dict(self.headers))
                    answer = server.answers.pop(0) if server.answers else answer_all
                answer = answer(body) if callable(answer) else answer
                status, content = answer if isinstance(answer, tuple) else (200, answer)
                data = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", content)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
