"""What loggers make of metrics before they log them."""

import pytest

from evsys_adapters.common.logged_values import prefixed


@pytest.mark.parametrize(
    ("stream", "key", "name"),
    [
        ("train", "loss", "train/loss"),
        ("train", "train/lr", "train/lr"),
        ("train", "actor/kl", "actor/kl"),
        ("train", "training", "train/training"),
        ("train", "train", "train/train"),
        ("eval/held out", "accuracy", "eval/held out/accuracy"),
        ("eval/held out", "eval/held out/accuracy", "eval/held out/accuracy"),
        ("eval/held out", "by_class/cat", "eval/held out/by_class/cat"),
        ("eval/held out", "eval/other/accuracy", "eval/held out/eval/other/accuracy"),
    ],
)
def test_a_metric_gets_the_prefix_of_its_stream_once(stream, key, name):
    assert prefixed(stream, key) == name
    assert prefixed(stream, name) == name
