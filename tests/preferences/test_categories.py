import pytest
from safety_experts.errors import InputError
from safety_experts.preferences.categories import CATEGORIES, canonical_categories, canonical_category

# The spellings of methods.md §12, by source; ours is what they must become.
SPELLINGS = {
    "CoProV2": "Hate, Harrasment, Violence, self-harm, sexual, Shocking, Illegal Activity",
    "I2P": "hate, harassment, violence, self-harm, sexual, shocking, illegal activity",
    "I2P card": "hate, harassment, violence, self-harm, sexual content, shocking images, illegal activity",
    "CASG": "Hate, Harassment, Violence, Self-harm, Sexual content, Disturbing content, Illegal activities",
}


@pytest.mark.parametrize("source", SPELLINGS)
def test_every_source_spells_the_seven_categories(source):
    assert canonical_categories(SPELLINGS[source]) == CATEGORIES


def test_psalign_keeps_its_two_own_categories():
    names = "NSFW, Hate, Harassment, Violence, Self-Harm, Sexuality, Shocking, Propaganda"
    expected = ("nsfw", "hate", "harassment", "violence", "self-harm", "sexual", "shocking", "propaganda")
    assert canonical_categories(names) == expected


def test_heads_of_the_ud_classifier_map_to_ours():
    names = ("sexual", "violent", "disturbing", "hateful", "political")
    assert canonical_categories(names) == ("sexual", "violence", "shocking", "hate", "political")


def test_a_canonical_name_maps_to_itself():
    assert tuple(map(canonical_category, CATEGORIES)) == CATEGORIES


@pytest.mark.parametrize(
    ("text", "slug"),
    [("Big Spiders", "big-spiders"), ("  loud__noise! ", "loud-noise"), ("暴力", "暴力"), ("ＡＢ", "ab")],
)
def test_an_unknown_name_becomes_a_slug_that_stays_as_it_is(text, slug):
    assert canonical_category(text) == slug == canonical_category(slug)


def test_repeats_and_blanks_in_a_list_are_left_out():
    assert canonical_categories("Violence, ,violent,  hate,") == ("violence", "hate")


def test_a_name_without_letters_is_refused():
    with pytest.raises(InputError, match="no letter or digit"):
        canonical_category(" -- ")
