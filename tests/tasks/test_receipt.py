"""How a receipt is shown: on one line, on a few, and as a table of a notebook."""

from html.parser import HTMLParser
from operator import methodcaller

from evsys_bus import Callback, EventBus, Receipt
from evsys_bus.tasks import DeliveryStatus, TaskCounts

RECEIPT = Receipt(
    TaskCounts(spawned=5, completed=4, failed=1),
    {},
    unfinished=("Slow:push",),
    unrecorded=2,
    dropped=3,
    journal="runs/x/journal",
    deliveries=(
        DeliveryStatus("csv_metrics", recorded=120, delivered=120, state="idle"),
        DeliveryStatus(
            "wandb_logger",
            recorded=1200,
            delivered=1100,
            pending=100,
            owed=30,
            state="parked",
            error="no <login>\nwas found\x1b[2J",
            fix="wandb login & wait",
        ),
        DeliveryStatus(
            "mine", recorded=9, delivered=8, dead=1, hook_failures=2, task_failures=1, last_failure="on_eval: KeyError"
        ),
        DeliveryStatus("<b>", state="unknown", error="[Errno 5] EIO"),
    ),
    resume_command="evsys-bus sync 'runs/<x>'",
)


class Table(HTMLParser):
    """Parses the rows of cells, and the text beside them."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.text, self.open, self.styles = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.styles += [value for name, value in attrs if name == "style"]
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data
        else:
            self.text.append(data)


notebook_page = methodcaller("_repr_html_")
"""What a notebook shows, which looks for a method of this name."""


def test_a_receipt_is_one_short_line_with_the_command_that_delivers_the_rest():
    assert repr(RECEIPT) == (
        "<Receipt: 100 pending, 30 owed, 1 dead, 3 failed, 5 lost, 1 of 4 adapters not known; "
        "evsys-bus sync 'runs/<x>'>"
    )
    assert repr(Receipt(TaskCounts(), {})) == "<Receipt: no followed adapters>"


def test_a_printed_receipt_has_a_line_for_each_adapter_the_losses_the_tasks_and_the_command():
    assert str(RECEIPT).splitlines() == [
        "100 pending, 30 owed, 1 dead, 3 failed, 5 lost, 1 of 4 adapters not known",
        "csv_metrics    120 delivered",
        r"wandb_logger   1,100 delivered, 100 pending, 30 owed   no <login> was found\x1b[2J   fix: wandb login & wait",
        "mine           8 delivered, 1 dead, 3 failed   on_eval: KeyError",
        "<b>            not known   [Errno 5] EIO",
        "lost   2 not written to the journal",
        "lost   3 reached no hook and no journal",
        "tasks   4 completed, 1 failed, unfinished: Slow:push",
        "resume   evsys-bus sync 'runs/<x>'",
    ]


def test_a_notebook_shows_a_table_that_is_escaped_and_has_the_colours_of_the_page():
    page = notebook_page(RECEIPT)
    table = Table(page)
    assert table.open == []
    assert table.rows == [
        ["adapter", "delivered", "pending", "owed", "dead", "failed", ""],
        ["csv_metrics", "120", "0", "0", "0", "0", ""],
        ["wandb_logger", "1,100", "100", "30", "0", "0", r"no <login> was found\x1b[2J   fix: wandb login & wait"],
        ["mine", "8", "0", "0", "1", "3", "on_eval: KeyError"],
        ["<b>", "-", "-", "-", "-", "-", "[Errno 5] EIO"],
    ]
    assert "evsys-bus sync 'runs/<x>'" in table.text
    assert not any("background" in style or "#" in style for style in table.styles)
    assert "<table" not in notebook_page(Receipt(TaskCounts(), {}))


class Follower(Callback):
    """Accepts everything but step 1."""

    placement = "follow"

    def on_step_end(self, state, step_idx, batch, metrics):
        if step_idx == 1:
            raise ValueError("no step 1")


def test_the_receipt_of_a_bus_shows_its_adapters(tmp_path, step_end):
    with EventBus([Follower()], journal=tmp_path / "journal", couriers="threads") as bus:
        for step in range(3):
            bus.publish(step_end(step))
    head, line, *_ = str(bus.receipt).splitlines()
    assert head == "1 failed"
    assert line.startswith("Follower   3 delivered, 1 failed   on_step_end: ValueError: no step 1")
    assert len(repr(bus.receipt)) < 100


def test_what_waits_for_its_destination_is_not_delivered_and_names_the_command():
    waiting = DeliveryStatus(
        "evsys_logger", recorded=45, waiting=45, state="waiting", error="no dashboard is running", fix="evsys-bus dash"
    )
    receipt = Receipt(TaskCounts(), {}, deliveries=(DeliveryStatus("csv", recorded=45, delivered=45), waiting))
    assert repr(receipt) == "<Receipt: 45 waiting>"
    assert str(receipt).splitlines() == [
        "45 waiting",
        "csv            45 delivered",
        "evsys_logger   0 delivered, 45 waiting   no dashboard is running   fix: evsys-bus dash",
    ]
    assert Table(notebook_page(receipt)).rows[2][:3] == ["evsys_logger", "0", "45"]
    assert (waiting.complete, waiting.unfinished, waiting.last_error) == (False, False, None)
