"""Decide what is a credential, and replace it: in records, in logs and in what the command line prints.

A name decides about the value under it. ``apiKeys``, ``AWS_SECRET_ACCESS_KEY`` and ``X-Api-Key`` are split into
words. Some names are certain and count everywhere (``password``, ``access_token``); others have everyday meanings too
and count in configurations only (``token``, ``auth``). ``pad_token`` and ``sort_key`` name no credential.

A text with the form of a credential counts at any position (``hf_…``, a URL with a password, ``--api-key …``); only
that part of it is replaced.
"""

import functools
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Final, cast

import msgspec

REDACTED: Final = "<redacted>"
REASON: Final = "it looks like a credential"

CONFIG_KEYS: Final = frozenset({"config", "run_config"})
"""Values under these keys are configurations."""
_CONFIG_LIKE_KEYS: Final = CONFIG_KEYS | frozenset(
    ["cfg", "env", "environ", "environment", "extras", "headers", "hparams", "hyperparameters", "kwargs", "settings"]
)
"""Values under these keys are searched like configurations."""


class Redaction(msgspec.Struct, frozen=True):
    """Which keys a program redacts besides those that look like credentials, and which it does not.

    Keys are compared without regard to case, and with ``-`` and ``_`` as the same.
    """

    redact: frozenset[str] = frozenset()
    """Everything under these keys is replaced; outside configurations, numbers are recorded."""
    reveal: frozenset[str] = frozenset()
    """Texts directly under these keys, or in lists there, are recorded whatever they look like."""

    @classmethod
    def of(cls, redact: Iterable[str] = (), reveal: Iterable[str] = ()) -> "Redaction":
        """Return the policy for these keys."""
        return cls(frozenset(map(_normalize_key, redact)), frozenset(map(_normalize_key, reveal)))


_redactions: Final[list[Redaction | None]] = [Redaction()]


def current_redaction() -> Redaction | None:
    """Return the policy of this process; None if all its events come from a journal, which is redacted already."""
    return _redactions[-1]


def set_redaction(redaction: Redaction | None) -> None:
    """Set what `current_redaction` returns, for code that writes files and has no bus at hand."""
    _redactions[-1] = redaction


# Names

NOT_SECRET: Final = 0
SECRET_IN_CONFIG: Final = 1
ALWAYS_SECRET: Final = 2

_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_JOINED_WORDS: Final = re.compile(
    r"(password|passwd|passphrase|passcode)$|(api|access|secret|private|auth|account)(?=keys?$)"
    r"|(access|auth|bearer|refresh|session|api|hf|github|gitlab|slack|wandb|bot)(?=tokens?$)|(client)(?=secret$)"
    r"|(connection)(?=string$)|(webhook)(?=url$)"
)
"""``apikey`` and ``dbpassword``: words that names often join without a separator."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_NEUTRAL_WORDS: Final = _set(
    "pem der hex raw hash base b text plain str value data prod production staging dev live old new current main "
    "default backup override encrypted encoded json v"
)
"""At the end of a name these do not change what it names: ``private_key_pem``, ``api_key_v2``."""
_DESCRIBING_WORDS: Final = _set(
    "algorithm alias count created dir directory dim enabled env exists expires expiry field file filename folder "
    "format header id kind len length lifetime limit max method min minutes mode name number param parameter path "
    "pattern policy prefix present ref required rotation seconds size source status strength suffix timeout ttl "
    "type uri url validator valid var variable"
)
"""A name that ends in one of these is about a credential and does not hold it: ``password_min_length``."""
_COUNTING_WORDS: Final = _set("has is max min n num number require total use uses with")
_ALWAYS: Final = re.compile(
    r"_(?:password|passwd|passphrase|passcode"
    r"|(?:api|access|secret|private|account|encryption|signing|ssh|hmac|deploy|licen[cs]e|master|functions?)_key"
    r"|(?:access|auth|api|bearer|refresh|session|security|oauth|bot|deploy|secret|csrf|xsrf|sas"
    r"|hf|hugging_face|huggingface|github|gitlab|slack|wandb|discord|telegram|npm|pypi)_token"
    r"|(?:db|database|user|smtp|ftp|admin|root|mail|email|proxy|redis|mysql|postgres|pg|mongo|http|basic)_(?:pass|pwd)"
    r"|client_secret|connection_string|conn_str|webhook(?:_url)?|psk|passkey|(?:recovery|backup)_code)_"
    r"|_(?:secret|authorization|cookie|dsn|credential|cred)_$|^_secret_(?!santa)"
)
"""Anywhere in a name, unless it ends in a word of `_DESCRIBING_WORDS`; of the last line at its end."""
_IN_CONFIG: Final = re.compile(
    r"_(?:token|auth|jwt|bearer|oauth|otp|totp|sas|pat|signature|pw|pwd|pin_code)_$|^_pass_$|^_token_"
)
_TOKENIZER_WORDS: Final = _set(
    "pad eos bos unk mask cls sep image img video audio vision special extra additional added start end begin stop "
    "think thinking reasoning eot eom eoh im fim prefix suffix middle next previous prev prompt input output first "
    "last per avg mean sum generated generate completion decoder encoder forced suppress bad good target src tgt "
    "label class box object time timestamp lang language system tool pattern word sub subword vocab vocabulary "
    "train training eval validation val warmup seen consumed trained budget limit batch sequence seq context answer "
    "query doc document soft virtual learnable register cache cached draft routed dropped expert max min n num "
    "number total new trigger initializer placeholder concept instance rare"
)
_KEY_OWNERS: Final = _set(
    "api openai anthropic claude aws azure gcp google gemini cohere mistral groq together fireworks replicate "
    "openrouter deepseek comet neptune mlflow langsmith langfuse pinecone weaviate qdrant stripe twilio sendgrid "
    "github gitlab slack discord datadog sentry modal runpod kaggle ngc minio clearml tavily serper exa wandb hf "
    "huggingface storage service subscription consumer client app application admin auth session shared cloudflare "
    "nvidia xai perplexity"
)


def is_secret_key(key: object, extra_keys: frozenset[str] = frozenset()) -> bool:
    """Whether a key of a configuration names a credential (``wandb_api_key``, ``clientSecret``)."""
    return key_strength(key) > NOT_SECRET or _normalize_key(key) in extra_keys


def key_strength(key: object, parent: object = "") -> int:
    """Return how surely a key names a credential: `NOT_SECRET`, `SECRET_IN_CONFIG` or `ALWAYS_SECRET`.

    Args:
        key: The key.
        parent: The key above it, which decides about a bare ``key``: ``{"wandb": {"key": …}}``.
    """
    name = key if type(key) is str else str(key)
    return _strength(f"{parent}_{name}" if name.lower() in {"key", "value"} and type(parent) is str else name)


@functools.lru_cache(maxsize=4096)
def _strength(name: str) -> int:  # noqa: PLR0911 - one line for each rule
    words = [
        word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word  # noqa: PLR2004 - "aws", "pass"
        for part in _WORDS.findall(name[:256])
        for word in _split_joined(part.lower())
    ]
    while len(words) > 1 and words[-1] in _NEUTRAL_WORDS:
        words.pop()
    joined = f"_{'_'.join(words)}_"
    if not words or words[0] in _COUNTING_WORDS:
        return NOT_SECRET
    if joined.endswith(("_webhook_url_", "_secret_id_")):
        return ALWAYS_SECRET
    if words[-1] in _DESCRIBING_WORDS:
        return NOT_SECRET
    if _ALWAYS.search(joined):
        return ALWAYS_SECRET
    if words[-1] == "key":
        return SECRET_IN_CONFIG if len(words) > 1 and words[-2] in _KEY_OWNERS else NOT_SECRET
    if _IN_CONFIG.search(joined) and (words[-1] != "token" or _TOKENIZER_WORDS.isdisjoint(words)):
        is_prefix = words[0] == "token" != words[-1]
        return SECRET_IN_CONFIG if not is_prefix or words[-1] in _KEY_OWNERS else NOT_SECRET
    return NOT_SECRET


def _split_joined(word: str) -> tuple[str, ...]:
    found = _JOINED_WORDS.search(word)
    if found is None:
        return (word,)
    parts = (word[: found.start()], found[0], word[found.end() :])
    return tuple(part for part in parts if part)


def _normalize_key(key: object) -> str:
    return str(key).lower().replace("-", "_")


# Texts

_HARMLESS_VALUE: Final = re.compile(
    r"\s*|<\|?[^<>]{0,60}\|?>|\[[A-Z_0-9]{1,30}\]|\*+|\.{3}|…|\$\{[^{}]*\}?|\$[A-Z]+(?:_[A-Z0-9]+)+|\{\{.*\}\}|env:\w+|\?\?\?"
    r"|(?i:none|null|auto|empty|dummy|true|false|required|optional|enabled|disabled|default|basic|bearer|oauth2?|anonymous|iam|tls)"
)
"""Placeholders, special tokens, references to the environment and words that are no credential under any name."""
_HARMLESS_IN_CONFIG: Final = re.compile(
    r"[\d.,_]+\s*[kKmMbBtTgG]?|.{1,2}|(?:~?/|[A-Z]:\\).*|[^->]+ -> [^->]+", re.DOTALL
)
_RANDOM_PIECE: Final = re.compile(r"(?<![A-Za-z0-9])[A-Za-z0-9+]{20,}={0,2}(?![A-Za-z0-9])")


def _looks_random(text: str) -> bool:
    """Whether a text has a long piece in which letters and digits alternate."""
    return any(
        sum(a.isdigit() != b.isdigit() for a, b in pairwise(piece)) >= 4  # noqa: PLR2004
        for piece in _RANDOM_PIECE.findall(text[:4096])
    )


def _is_mixed(text: str) -> bool:
    """Whether a text has a digit or a sign that words do not have, or upper case within lower case."""
    is_long = len(text) >= 32  # noqa: PLR2004
    return is_long or any(map(str.isdigit, text)) or "=" in text or not (text.islower() or text[1:].islower())


def _keep_words(found: re.Match[str]) -> str:
    return f"{found[1]}{REDACTED}" if _is_mixed(found[2]) else found[0]


def _redact_parameter(found: re.Match[str]) -> str:
    name, value = found[2], found[3]
    is_secret = (
        _normalize_key(name) in _SIGNATURE_PARAMETERS
        or key_strength(name) > NOT_SECRET
        or (name.lower() == "key" and _is_mixed(value))
    )
    return f"{found[1]}{name}={REDACTED}" if is_secret and value != REDACTED else found[0]


def _redact_assignments(text: str, heads: re.Pattern[str]) -> str:
    """Redact the values of ``KEY=value``, ``"key": "value"`` or ``--key value``, of which ``heads`` finds the names."""
    parts: list[str] = []
    done = 0
    for found in heads.finditer(text):
        strength = key_strength(found[1])
        value = _VALUE.match(text, found.end()) if strength and found.start() >= done else None
        if value is None:
            continue
        bare = value[0].strip("\\\"'")
        is_option = found[0].startswith("-") or (found[1].isupper() and "_" in found[1])
        is_long = len(bare) >= 8 and "=" in found[0] and any(map(str.isdigit, bare))  # noqa: PLR2004 - not "oauth2"
        is_sure = strength == ALWAYS_SECRET or is_option or is_long or _looks_random(bare)
        if is_sure and not _HARMLESS_VALUE.fullmatch(bare) and not bare.startswith(REDACTED):
            quote = value[0][: len(value[0]) - len(value[0].lstrip("\\\"'"))]
            parts += (text[done : found.end()], quote, REDACTED, quote)
            done = value.end()
    return "".join((*parts, text[done:])) if parts else text


def _redact_header(found: re.Match[str]) -> str:
    return found[0] if found[2].startswith(REDACTED) else f"{found[1]}{REDACTED}"


def _redact_pair(found: re.Match[str]) -> str:
    if key_strength(found[3]) < ALWAYS_SECRET or _HARMLESS_VALUE.fullmatch(found[5]):
        return found[0]
    return f"{found[1]}{found[4]}{REDACTED}{found[4]}"


_SIGNATURE_PARAMETERS: Final = _set(
    "x_amz_signature x_amz_security_token x_amz_credential x_goog_signature x_goog_credential signature sig token "
    "awsaccesskeyid sas"
)
_ASSIGNMENT: Final = re.compile(
    r"""(?<![\w.-])-{0,2}([A-Za-z][\w.-]{0,80})
        (?: \\{0,3}["']\]?\s{0,4}[=:]\s{0,4} | [=:](?=\S) | \s{0,2}[=:]\s{1,4}(?=\\{0,3}["'])
          | (?<=[a-z]):\s{1,2}(?=[^\s"']{4}) )""",
    re.VERBOSE,
)
_OPTION: Final = re.compile(r"(?<![\w-])--?([A-Za-z][\w.-]{0,80})\s{1,4}(?=[^\s-])")
_VALUE: Final = re.compile(
    r"""\\{0,3}"(?:[^"\\\n]|\\[^"]){0,1000}\\{0,3}" | \\{0,3}'(?:[^'\\\n]|\\[^']){0,1000}\\{0,3}'
        | \[[^\]\n]{0,500}\] | \{[^}\n]{0,500}\} | (?:\\{0,3}["'])?[^\s"',;&)}\]]{1,4096}""",
    re.VERBOSE,
)

_PATTERNS: Final[tuple[tuple[tuple[str, ...], re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]] = (
    (
        ("-BEGIN ",),
        re.compile(
            r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY.*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY[A-Z ]{0,8}-----|\Z)",
            re.DOTALL,
        ),
        REDACTED,
    ),
    (
        ("://",),
        re.compile(
            r"(://[^/\s:@'\"?#<>]{0,256}:)(?!<redacted>@)"
            r"(?:[^/\s'\"?#<>]{1,512}|(?!\d{0,5}[/?#]|[$<{])(?:(?!://)[^\s@'\"<>,]){1,512})@"
        ),
        rf"\1{REDACTED}@",
    ),
    (("://",), re.compile(r"(://)[^/\s:@'\"?#<>]{20,512}@"), rf"\1{REDACTED}@"),
    (("hooks.slack.com/",), re.compile(r"(hooks\.slack\.com/)[^\s'\"<>]+"), rf"\1{REDACTED}"),
    (("/api/webhooks/",), re.compile(r"(/api/webhooks/)[^\s'\"<>]+"), rf"\1{REDACTED}"),
    (("webhook.office.com/",), re.compile(r"(webhook\.office\.com/)[^\s'\"<>]+"), rf"\1{REDACTED}"),
    (("telegram.org/bot",), re.compile(r"(telegram\.org/bot)[^\s'\"<>/]+"), rf"\1{REDACTED}"),
    (
        ("earer ", "EARER ", "asic ", "ASIC ", "Token ", "token "),
        re.compile(
            r"(?i)\b((?:bearer|basic)\s{1,4}|token\s{1,4}(?=\w{20}))([A-Za-z0-9._~+/:-]{6,}(?![A-Za-z0-9._~+/:-]|=\w)={0,2})"
        ),
        _keep_words,
    ),
    (
        (
            "sk-",
            "sk_",
            "hf_",
            "gsk_",
            "r8_",
            "nvapi-",
            "pplx-",
            "xai-",
            "npm_",
            "pypi-",
            "whsec_",
            "rk_live",
            "tvly-",
            "tml-",
            "fw_",
        ),
        re.compile(
            r"(?<![A-Za-z0-9_])((?:c?sk-|[sr]k_(?:live|test)_|hf_|gsk_|r8_|nvapi-|pplx-|xai-|npm_|pypi-|whsec_|tvly-|tml-|fw_))"
            r"([A-Za-z0-9_*-]{8,})"
        ),
        lambda found: REDACTED if _is_mixed(found[2]) else found[0],
    ),
    (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "gldt-", "glrt-", "glcbt-", "xox", "xapp-"),
        re.compile(
            r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{10,}|github_pat_\w{10,}|gl(?:pat|dt|rt|cbt|ptt)-[\w-]{8,}"
            r"|xox[a-z](?:\.xox[a-z])?-[\w-]{8,}|xapp-[\w-]{10,})"
        ),
        REDACTED,
    ),
    (
        ("AKIA", "ASIA", "AIza", "ya29.", "eyJ", "SG.", "hvs.", "dop_v1_", "dapi", "lsv2_", "dckr_pat_", "AGE-SECRET-"),
        re.compile(
            r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[A-Z0-9]{12,20}(?![A-Za-z0-9])|AIza[\w-]{20,}|ya29\.[\w.-]{8,}"
            r"|eyJ[\w-]{4,}\.[\w-]{4,}(?:\.[\w-]*){0,4}|SG\.[\w-]{10,}\.[\w-]{10,}|hvs\.[\w-]{16,}|dop_v1_[a-f0-9]{20,}"
            r"|dapi[a-f0-9]{30,}|lsv2_\w{16,}|dckr_pat_[\w-]{10,}|AGE-SECRET-KEY-[A-Z0-9]{20,})"
        ),
        REDACTED,
    ),
    (("curl ",), re.compile(r"(\s(?:-u|--user)\s{1,4}[^\s:]{1,100}:)\S+"), rf"\1{REDACTED}"),
    (("wandb_v1_", "local-"), re.compile(r"\b(?:wandb_v1_\w{10,}|local-[a-f0-9]{40})"), REDACTED),
    (("=",), re.compile(r"([?&;])([A-Za-z][\w.-]{0,60})=([^&\s\"'<>#;]+)"), _redact_parameter),
)
_ASSIGNMENT_STEMS: Final = ("pass", "secret", "token", "key", "auth", "cookie", "cred", "dsn", "conn", "webhook", "pwd")
_PROSE: Final = re.compile(
    r"(?i)\b((?:(?:api|access|secret|private) key|(?:access|auth|api) token)s?(?: is)?[:=]\s{0,2}"
    r"|passw(?:ord|d) is |login\s{1,4}\S{1,200}\s{1,4}password\s{1,4})([^\s\"',;]{6,})"
)
_HEADER_PAIR: Final = re.compile(r"(\(b?([\"'])([\w-]{2,60})\2,\s?b?)([\"'])((?:(?!\4).)+)\4")
_HEADER: Final = re.compile(
    r"(?i)(?<![\w-])((?:proxy-authorization|authorization|set-cookie|cookie):[ \t]*)([^\"'\r\n}]+)"
)


def redact_text(text: str) -> str:
    """Return a text with everything in it replaced that has the form of a credential."""
    if len(text) < _MIN_CHARS:
        return text
    for markers, pattern, replacement in _PATTERNS:
        for marker in markers:
            if marker in text:
                text = pattern.sub(replacement, text)
                break
    if "=" in text or ":" in text or "-" in text or " is " in text or "login" in text:
        lower = text.lower()
        if any(stem in lower for stem in _ASSIGNMENT_STEMS):
            if "cookie:" in lower or "authorization:" in lower:
                text = _HEADER.sub(_redact_header, text)
            text = _HEADER_PAIR.sub(_redact_pair, text)
            text = _PROSE.sub(_keep_words, text)
            text = _redact_assignments(text, _ASSIGNMENT)
            if "-" in text:
                text = _redact_assignments(text, _OPTION)
    return text


_MIN_CHARS: Final = 7
redact_key: Final = functools.lru_cache(maxsize=4096)(redact_text)
"""`redact_text` for names and other short texts that repeat."""


# Data


def has_credential(params: object) -> bool:
    """Whether built-in data holds a credential, by a name or by the form of a text."""
    if isinstance(params, dict):
        return any(
            (key_strength(key) > NOT_SECRET and _is_credential(value, SECRET_IN_CONFIG)) or has_credential(value)
            for key, value in cast("dict[str, object]", params).items()
        )
    if isinstance(params, list):
        return any(map(has_credential, cast("list[object]", params)))
    return isinstance(params, str) and redact_text(params) != params


def redact(plain: Any, redaction: Redaction = Redaction(), path: str = "") -> dict[str, str]:  # noqa: B008 - frozen
    """Redact what looks like a credential, in place, by the names and the texts in built-in data.

    Args:
        plain: A dict or a list without cycles, such as `evsys_bus.codec.to_builtins` returns.
        redaction: Further keys to redact, and keys to leave as they are.
        path: Path of the data; prefix of the paths of what is replaced.

    Returns:
        Path -> reason, in the form that `to_builtins` returns.
    """
    if type(plain) is dict and not redaction.redact and path not in _CONFIG_LIKE_KEYS and _is_clean(plain):  # pyright: ignore[reportUnknownArgumentType] - untyped
        return {}
    walk = _Walk(redaction)
    walk.redact_container(plain, path, path, in_config=path in _CONFIG_LIKE_KEYS)
    return walk.replaced


def _is_clean(entries: dict[str, Any]) -> bool:
    """Whether all keys and texts are known to be harmless; False also for those that are new."""
    if not _known_keys.issuperset(entries):
        return False
    for key, item in entries.items():
        if type(item) is float:
            continue
        if type(item) not in _WITHOUT_TEXT and not (key in _clean_keys and _is_clean_item(item)):
            return False
    return True


def _is_clean_item(item: Any) -> bool:
    kind: type = type(item)  # pyright: ignore[reportUnknownVariableType] - untyped
    if kind in _WITHOUT_TEXT:
        return True
    if kind is str:
        return item in _clean_texts
    if kind is dict:
        return _is_clean(item)
    return kind is list and (_WITHOUT_TEXT.issuperset(map(type, item)) or all(map(_is_clean_item, item)))


def _remember(known: set[str], texts: Iterable[str]) -> None:
    if len(known) > _MAX_CLEAN:
        known.clear()
    known.update(texts)


class _Walk:
    """One search through built-in data."""

    __slots__ = ("_has_own_keys", "_redaction", "replaced")

    def __init__(self, redaction: Redaction) -> None:
        self._redaction = redaction
        self._has_own_keys = bool(redaction.redact or redaction.reveal)
        self.replaced: dict[str, str] = {}

    def redact_container(self, value: Any, path: str, key: str, *, in_config: bool) -> None:
        if type(value) is dict:
            self._redact_entries(cast("dict[str, Any]", value), path, key, in_config=in_config)  # pyright: ignore[reportUnknownArgumentType] - untyped
        elif type(value) is list:
            self._redact_items(cast("list[Any]", value), path, key, in_config=in_config)

    def _redact_entries(self, entries: dict[str, Any], path: str, parent: str, *, in_config: bool) -> None:
        if not _known_keys.issuperset(entries):
            self._redact_keys(entries)
        if not in_config and _WITHOUT_TEXT.issuperset(map(type, entries.values())):
            return
        sibling = entries.get("name", entries.get("key", entries.get("Name")))  # {"name": "HF_TOKEN", "value": …}
        for key, item in entries.items():
            kind: type = type(item)  # pyright: ignore[reportUnknownVariableType] - untyped
            if kind is str and not self._has_own_keys and item in _clean_texts and key in _clean_keys:
                continue
            if kind not in _WITHOUT_TEXT:
                name = sibling if key in _VALUE_KEYS and type(sibling) is str else key
                item_path = f"{path}.{key}" if path else key
                entries[key] = self._redact_value(item, item_path, name, parent, in_config=in_config)
            elif kind is int and in_config and self._is_secret_number(key, item):
                entries[key] = self._replace(f"{path}.{key}" if path else key)

    def _redact_keys(self, entries: dict[str, Any]) -> None:
        """Redact keys that are credentials themselves; remember the others."""
        renamed = {key: shown for key in entries if (shown := redact_key(key)) != key}
        short_keys = [key for key in entries if key not in renamed and len(key) <= _MAX_CACHED_CHARS]
        _remember(_known_keys, short_keys)
        _remember(_clean_keys, filter(_is_clean_key, short_keys))
        if not renamed:
            return
        copied = list(entries.items())
        entries.clear()
        for key, item in copied:
            name = shown = renamed.get(key, key)
            number = 1
            while name in entries:
                number += 1
                name = f"{shown}#{number}"
            entries[name] = item

    def _redact_items(self, items: list[Any], path: str, parent: str, *, in_config: bool) -> None:
        option = NOT_SECRET  # of a command line: ["--api-key", "…"]
        for index, item in enumerate(items):
            if type(item) is str:
                if option and not item.startswith("-") and _is_credential(item, option):
                    items[index] = self._replace(f"{path}[{index}]")
                else:
                    items[index] = self._redact_text(item, f"{path}[{index}]")
                option = key_strength(item) if item.startswith("-") and "=" not in item else NOT_SECRET
            elif type(item) not in _WITHOUT_TEXT:
                if type(item) is list and _is_header(cast("list[Any]", item)):
                    item[1] = self._replace(f"{path}[{index}][1]")
                items[index] = self._redact_value(item, f"{path}[{index}]", "", parent, in_config=in_config)

    def _redact_value(self, item: Any, path: str, key: str, parent: str, *, in_config: bool) -> object:  # noqa: PLR0911 - one line for each kind of value
        if self._has_own_keys and key:
            name = _normalize_key(key)
            if name in self._redaction.reveal:
                for each in cast("list[Any]", item) if type(item) is list else (item,):
                    if type(each) is dict:
                        self.redact_container(each, path, "", in_config=in_config)
                return item  # pyright: ignore[reportUnknownVariableType] - untyped
            if name in self._redaction.redact:
                return self._replace(path)
        if type(item) is str:
            shown = _redact_value_text(key, parent, item, in_config)
            return item if shown == item else self._replace(path, shown)
        if type(item) is bytes:
            if key and _is_secret(key, parent, in_config) and item:
                return self._replace(path)
            return self._redact_text(item.decode("latin-1"), path).encode("latin-1")
        if key and _is_secret(key, parent, in_config) and _is_credential(item, key_strength(key, parent)):
            return self._replace(path)
        self.redact_container(item, path, key or parent, in_config=in_config or key in _CONFIG_LIKE_KEYS)
        return item

    def _is_secret_number(self, key: str, number: int) -> bool:
        """Whether a number in a configuration is a credential: ``{"password": 12345678}``."""
        name = _normalize_key(key)
        is_secret = key_strength(key) == ALWAYS_SECRET and abs(number) > 9  # noqa: PLR2004 - no count
        return name not in self._redaction.reveal and (is_secret or name in self._redaction.redact)

    def _redact_text(self, text: str, path: str) -> str:
        shown = _redact_form(text)
        return text if shown == text else self._replace(path, shown)

    def _replace(self, path: str, shown: str = REDACTED) -> str:
        path = redact_text(path)
        if len(self.replaced) < _MAX_REASONS:
            self.replaced[path if len(path) <= _MAX_PATH_CHARS else f"{path[:_MAX_PATH_CHARS]}…"] = REASON
        return shown


_MAX_REASONS: Final = 100
_MAX_PATH_CHARS: Final = 256
_MAX_CACHED_CHARS: Final = 256
_MAX_CLEAN: Final = 10_000
_WITHOUT_TEXT: Final = frozenset({float, int, bool, type(None)})
_VALUE_KEYS: Final = frozenset({"value", "Value", "val"})
_GENERAL_KEYS: Final = _VALUE_KEYS | {"key"}
"""The name above or beside them decides."""
_FUNCTIONAL_KEYS: Final = frozenset({"output_dir", "root", "run", "run_key", "type"})
"""Of handles and events; readers use the texts under them as they are. Passwords in URLs are redacted nevertheless."""
_known_keys: Final[set[str]] = set()
"""Keys that are no credentials themselves."""
_clean_keys: Final[set[str]] = set()
"""Keys under which a text is judged by its form alone."""
_clean_texts: Final[set[str]] = set()
"""Texts without the form of a credential."""


def _is_clean_key(key: str) -> bool:
    is_general = key in _GENERAL_KEYS or key in _CONFIG_LIKE_KEYS or key[-3:].lower() == "key"
    return not is_general and key_strength(key) == NOT_SECRET


def _is_secret(key: str, parent: str, in_config: bool) -> bool:
    return key_strength(key, parent) >= (SECRET_IN_CONFIG if in_config else ALWAYS_SECRET)


def _redact_value_text(key: str, parent: str, text: str, in_config: bool) -> str:
    """Redact a text under a key."""
    strength = key_strength(key, parent) if key else NOT_SECRET
    if strength >= (SECRET_IN_CONFIG if in_config else ALWAYS_SECRET):
        if _is_credential(text, strength):
            return REDACTED
    elif (strength or (in_config and key[-3:].lower() == "key")) and _looks_random(text):
        return REDACTED
    shown = _redact_form(text)
    return text if key in _FUNCTIONAL_KEYS and not in_config and "://" not in text else shown


def _redact_form(text: str) -> str:
    """Like `redact_text`; texts that repeat are searched once."""
    if text in _clean_texts:
        return text
    shown = redact_text(text)
    if shown == text and len(text) <= _MAX_CACHED_CHARS and not text.startswith("-"):
        _remember(_clean_texts, (text,))
    return shown


def _is_credential(item: Any, strength: int) -> bool:
    """Whether a value under a secret key is a credential, or holds one."""
    if isinstance(item, str):
        is_harmless = _HARMLESS_VALUE.fullmatch(item) or (
            strength == SECRET_IN_CONFIG and _HARMLESS_IN_CONFIG.fullmatch(item)
        )
        return not is_harmless
    if isinstance(item, dict):
        return any(_is_credential(each, strength) for each in cast("dict[str, Any]", item).values())
    if isinstance(item, list):
        return any(_is_credential(each, strength) for each in cast("list[Any]", item))
    return isinstance(item, bytes) and len(item) > 0


def _is_header(item: list[Any]) -> bool:
    """Whether a list is a pair of a header's name and a credential: ``["X-Api-Key", "…"]``."""
    return (
        len(item) == 2  # noqa: PLR2004
        and type(item[0]) is type(item[1]) is str
        and key_strength(item[0]) == ALWAYS_SECRET
        and _is_credential(item[1], ALWAYS_SECRET)
    )
