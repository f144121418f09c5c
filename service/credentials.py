"""What looks like a credential: keys, tokens, passwords. One definition, for logs, traces and callers.

Each pattern takes time in proportion to the text: callers and upstreams write what is searched.
"""

from __future__ import annotations

import re
from typing import Final

# An underscore before a key is no letter of it: in names like MY_sk-... it would hide the key from `\b`.
_BEGINS: Final = r"(?<![A-Za-z0-9])"
# Whatever stands before it in one word: OPENAI_API_KEY, DB_PASSWORD, client_secret, accessToken.
_NAME: Final = (
    r"(?<![\w-])[\w-]*(?i:(?:api|access|secret|private|signing)[_-]?key|(?P<word>secret|token)"
    r"|passw(?:or)?d|passphrase|(?P<header>authorization))(?![\w-])"
)
# JSON inside JSON has backslashes before its quotes, one more at each level.
_QUOTE: Final = r"\\{0,8}[\"']"
# Its schemes are many, and each has a form of its own: `Digest` has quotes after a `=`. Of two words one is
# long, or has a digit or a `=`: where people write of an authorization, few are.
_HEADER: Final = (
    rf"(?:{_QUOTE})?(?=(?:[^\s\"'\\]{{1,40}}[ \t]{{1,20}})?(?:[^\s\"',;\\]{{12}}|[^\s\"',;\\]{{0,40}}[\d=]))"
    rf"(?>=(?:{_QUOTE})[^\"'\\\r\n]*{_QUOTE}|[^\"'\\\r\n]){{6,}}"
)
# "Invalid token: endfor" tells of none.
_NO_WORD: Final = r"(?=[^\s\"',;\\]{0,12}\d|[^\s\"',;\\]{12})"
_NAMED: Final = (
    rf"{_NAME}(?:{_QUOTE})?\s{{0,20}}[:=]\s{{0,20}}(?(header){_HEADER}"
    rf"|(?:(?P<quote>{_QUOTE})[^\"']{{6,200}}?(?P=quote)"
    rf"|(?:{_QUOTE})?(?i:(?:basic|bearer|digest|token)\s{{1,20}})?(?(word){_NO_WORD})[^\s\"',;\\]{{6,}}))"
)

CREDENTIAL: Final = re.compile(
    "|".join(
        (
            r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
            _NAMED,
            # User and password of an address, with whatever letters; in JSON not beyond the end of a string.
            r"(?<=://)(?:[^/\s\"']|[\"'](?![\s,:}\]]))+(?=@)",
            rf"{_BEGINS}(?i:bearer)\s+[^\s\"',;\\]{{6,}}",
            rf"{_BEGINS}(?i:basic)\s+[A-Za-z0-9+/]{{6,}}={{1,2}}",  # without the padding it may be a word
            rf"{_BEGINS}eyJ[A-Za-z0-9_-]{{8,}}(?:\.[A-Za-z0-9_-]*){{0,4}}",  # JSON web tokens, cut ones too
            rf"{_BEGINS}sk-[A-Za-z0-9_*-]{{5,}}",  # providers show the beginning of one that they refuse
            rf"{_BEGINS}(?:pk|rk|csk)-[A-Za-z0-9_*-]{{8,}}",
            # Names of pods and services begin like Weir's own keys, and have no capitals.
            rf"{_BEGINS}weir-(?=[a-z0-9-]{{0,40}}[A-Z_])[A-Za-z0-9_-]{{8,}}",
            rf"{_BEGINS}(?:xai|pplx|nvapi|glpat)-[\w-]{{16,}}",
            rf"{_BEGINS}[spr]k_(?:live|test)_[A-Za-z0-9]{{8,}}",
            rf"{_BEGINS}gh[opsur]_[A-Za-z0-9]{{16,}}",
            rf"{_BEGINS}github_pat_\w{{16,}}",
            rf"{_BEGINS}(?:gsk|hf|r8)_[A-Za-z0-9]{{16,}}",
            rf"{_BEGINS}xox[a-z]-[\w-]{{8,}}",
            rf"{_BEGINS}A(?:KIA|SIA)[0-9A-Z]{{16}}(?![A-Za-z0-9])",
            rf"{_BEGINS}AIza[\w-]{{30,}}",
        )
    ),
    re.DOTALL,
)
