"""A part that applies another one."""

import pytest

import kvcomp


@pytest.mark.parametrize(
    ("recipe", "kind", "use"),
    [("look-m", "merger", "unrotated"), ("look-m", "merger", "values-only"), ("critical", "scorer", "critical")],
)
def test_a_part_inside_itself_is_refused(recipe: str, kind: str, use: str) -> None:
    with pytest.raises(kvcomp.ConfigError, match=rf"{kind}\.{kind}: must be a {kind} other than '{use}'"):
        kvcomp.strategy(recipe, **{kind: {"use": use, kind: {"use": use}}})
