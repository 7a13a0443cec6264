"""Whatever events hold, they never stop a store, and pages remain JSON."""

import contextlib
from contextlib import closing

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evsys_adapters.dashboard import hosted, pages
from evsys_adapters.dashboard.hosted import HostedError
from support.dashboard_stores import open_store

TAGS = (
    "experiment_start group_start run_start train_start step_end checkpoint eval benchmark_eval train_end run_end "
    "experiment_end run.metrics run.epoch_end run.rollout run.train_data run.environment run.config_update run.summary "
    "run.content run.alert system_metrics learnt run.delivery_changed run.hook_times made_up"
).split()
FIELDS = (
    "ctx state step_idx step batch row metrics eval_name eval_result predictions artifacts run_result arm result "
    "group_name epoch rollouts rollout_items rows facts config values item title text level run extras adapter journal "
    "status rank hooks"
).split()
KEYS = st.sampled_from(
    "output_dir run_key ids extras config run_config group_name experiment_id run_id name step num_steps error status "
    "metrics eval_metrics best_score tags seed arm stage success_metric metadata batch loss a/b reward instruction "
    "kind path digest notes planned matrix recipe n_repeats".split()
)
ODD_KEYS = st.integers(0, 3) | st.binary(max_size=2) | st.none()
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.sampled_from(
        ["", "/runs/x", "a", "x" * 2_000, "\0", "<b>", "completed", "running", "max", "NaN", "../..", "é\u2028"]
    )
    | st.binary(max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | ODD_KEYS, inner, max_size=4),
    max_leaves=8,
)
HANDLES = st.dictionaries(
    st.sampled_from(["output_dir", "run", "root", "step", "num_steps", "run_key", "ids", "run_config", "context"]),
    VALUES,
)
RANKS = st.integers(0, 3) | st.sampled_from([-1, 2**63 - 1, 2**64 - 1])
EVENTS = st.builds(
    lambda tag, fields, state, ctx: (
        {"type": tag, **fields} | ({"state": state} if state else {}) | ({"ctx": ctx} if ctx else {})
    ),
    st.sampled_from(TAGS),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6),
    HANDLES,
    HANDLES,
)


FEW = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
FEWER = settings(FEW, max_examples=2)  # each creates all the tables, and waits for a server hundreds of times
HISTORIES = st.lists(
    st.tuples(EVENTS, st.none() | st.sampled_from(["a", "b/c", ""]), RANKS, st.floats()),
    max_size=25,
)


@FEW
@given(HISTORIES)
def test_odd_events_never_stop_a_store_and_pages_remain_json(tmp_path_factory, events):
    deliver_odd_events(tmp_path_factory.mktemp("odd"), events)


@pytest.mark.servers
@FEWER
@given(HISTORIES)
def test_odd_events_never_stop_a_store_in_postgres(new_postgres_folder, events):
    deliver_odd_events(new_postgres_folder(), events)


def deliver_odd_events(folder, events):
    with closing(open_store(folder)) as store:
        payloads = [
            msgspec.msgpack.encode({"stream": "s", "seq": n, "time": time, "event": event, "run": run, "rank": rank})
            for n, (event, run, rank, time) in enumerate(events, start=1)
        ]
        store.ingest("s", 0, payloads)
        check_pages(store)
        reopened = store.reopen()
        check_pages(reopened)
        reopened.close()


def check_pages(store):
    home = pages.home(store, 2e12)
    for row in home["experiments"]:
        page = pages.experiment(store, row["id"], 2e12)
        assert page is not None
        for found in (row, page):
            msgspec.json.decode(msgspec.json.encode(found))


OTHERS = "create_experiment create_run create_project create_dataset create_benchmark list_runs made_up".split()
OPS = [*hosted._REQUIRED, *OTHERS]
TEXTS = st.sampled_from(["", "r", "e", "g", "completed", "7", "\ud800"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=6,
)
ARGS = st.dictionaries(
    st.sampled_from(
        "project_id experiment_id group_id run_id eval_id dataset_id benchmark_id name step metrics value split kind "
        "patch rows start_idx limit offset run_config status seed tags config uri label breakdowns reward id".split()
    ),
    JSON,
    max_size=8,
)


CALLS = st.lists(st.tuples(st.sampled_from(OPS), ARGS, st.sampled_from(["r", "e"])), max_size=25)


@FEW
@given(CALLS)
def test_odd_calls_are_answered_or_refused_and_never_stop_a_store(tmp_path_factory, calls):
    make_odd_calls(tmp_path_factory.mktemp("odd"), calls)


@pytest.mark.servers
@FEWER
@given(CALLS)
def test_odd_calls_never_stop_a_store_in_postgres(new_postgres_folder, calls):
    make_odd_calls(new_postgres_folder(), calls)


def make_odd_calls(folder, calls):
    with closing(open_store(folder)) as store:
        for op, args, name in calls:
            given_args = {"run_id": name, "experiment_id": name, "step": 1} | args
            with contextlib.suppress(HostedError):
                msgspec.json.encode(hosted.call(store, op, given_args, now=1_000.0))
        check_pages(store)
