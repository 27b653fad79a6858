"""Whatever a server does, a fetch ends with a code, leaves nothing half done, and the rerun completes.

Where the faults of a download are shown, by number of the list that this project keeps:

    12  redirects that leave the rules      here; test_http: redirects_that_leave_the_rules, the_eleventh_redirect
    13  dropped after a part, resumed       here (cut); test_http: a_broken_download_is_resumed
    14  Range answered with 200             here; test_http: parts_that_do_not_fit (range ignored)
    15  206 that does not fit, new ETag     here; test_http: parts_that_do_not_fit
    16  compressed although not asked for   here (gzip bomb); test_http: an_empty_and_an_encoded_body
    17  length short, long, none, zero      here
    18  429, 503, Retry-After; 404          here; test_http: retry_after_is_obeyed, not_found_is_not_retried
    19  body differs from the first seen    test_fetch: a_changed_file_is_reported; test_fetch_kinds: what_changed
    20  endless, 10 GB, bomb                here
    21  one byte a second                   here (slow drip); test_http: a_drip_ends_at_the_deadline
    22  HTML with 200 for a text            here; test_archive; test_sources_standard_ebooks
    23  archives that reach outside         test_import: an_epub_that_reaches_outside
    24  encodings                           test_corpus, test_encoding: bytes_are_decoded_by_rule
    25  TLS, DNS, proxy, offline            test_http: an_unknown_name, offline_makes_no_connection; test_fetch_kinds: proxies
    26  two works with one address          test_fetch_kinds: two_works_with_one_address; test_http: paced_two_seconds
    27  one of many fails                   test_fetch: lasting_faults_fail_their_source_alone
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from greatctl.store import artifact
from tests.fetch_faults import FAULTS, Fault, odd_server, play
from tests.test_fetch import Bench, Mirror, server  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def odd() -> Iterator[str]:
    with odd_server() as address:
        yield address


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions of installed packages take longer to look up than a small fetch."""
    monkeypatch.setattr(artifact, "versions", dict)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_misbehaving_server_ends_well(fault: Fault, tmp_path: Path, server: Mirror, odd: str) -> None:  # noqa: F811
    outcome = play(fault, Bench(tmp_path), server, odd)
    assert outcome.code == fault.code, outcome.reason
    assert outcome.folder == (fault.code == 0)  # nothing under a final name unless it is whole
    assert outcome.rerun == 0 and outcome.same == fault.same and outcome.leftovers == []
    if fault.resumes:
        assert outcome.waiting > 0 and outcome.range == f"bytes={outcome.waiting}-"
    elif fault.code == 6:
        assert outcome.waiting == 0  # what is wrong is not kept for resuming


def test_a_server_that_asks_to_wait_is_waited_for(tmp_path: Path, server: Mirror, odd: str) -> None:  # noqa: F811
    asked = next(fault for fault in FAULTS if fault.name.startswith("429 with"))
    assert [w for w in play(asked, Bench(tmp_path), server, odd).waited if w] == [7.0, 7.0]
