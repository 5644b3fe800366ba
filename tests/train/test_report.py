"""The comparison's report: complete, self-contained, and written whole."""

import html.parser

import pytest

from jattn.train import report

RESULTS = [
    report.SchemeResult(
        scheme=scheme,
        parameters=1_234_567,
        validation_bits_per_byte=bits,
        training_tokens_per_second=20_000.0,
        decode_tokens_per_second=300.0,
        cache_bytes=2048,
        peak_bytes=3 * 2**20,
        skipped_steps=0,
        curve=((10, 4.0), (20, bits)),
        sample="def f(x): return x < 1",
    )
    for scheme, bits in [("dense", 2.125), ("nsa", 2.0625)]
]


class Page(html.parser.HTMLParser):
    """Collects the table's cells and every address the page refers to."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.tag = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tag = tag
        if tag == "tr":
            self.rows.append([])
        self.addresses += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        self.tag = None

    def handle_data(self, data):
        if self.tag in ("td", "th"):
            self.rows[-1].append(data)


@pytest.fixture
def page(tmp_path):
    path = report.write_report(
        tmp_path, RESULTS, {"unigram entropy": 4.5}, {"steps": "20 & more"}
    )
    return Page(path.read_text())


def test_the_best_scheme_comes_first_and_references_last(page):
    head, *rows = page.rows
    assert head[0] == "scheme"
    assert [row[0] for row in rows] == ["nsa", "dense", "unigram entropy"]
    assert rows[0][1:7] == ["1,234,567", "2.062", "20,000", "300", "2.0", "3.0"]
    assert rows[2][1] == "4.500"


def test_the_page_needs_no_network(page):
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/png") for address in page.addresses)


def test_text_is_escaped_and_plots_are_kept(tmp_path):
    text = report.write_report(tmp_path, RESULTS, {}, {"steps": "20 & more"})
    assert "return x &lt; 1" in text.read_text()
    assert "20 &amp; more" in text.read_text()
    for name in ("curves.png", "trade_off.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
