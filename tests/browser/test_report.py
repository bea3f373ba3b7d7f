"""The report in a browser without a network: it asks for nothing, and its explorer is alive."""

import pytest

from workbench import report

pytestmark = pytest.mark.browser


def test_a_report_asks_for_nothing_and_its_runs_can_be_explored(browser, case_study, tmp_path):
    path = report.report(case_study.folder.parent, tmp_path / "report")
    context = browser.new_context(offline=True)
    page = context.new_page()
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri(), wait_until="load")
    page.get_by_text("1 run, 1 seed", exact=True).wait_for()
    step = page.get_by_role("slider").first
    step.wait_for()
    before = step.input_value()
    step.focus()
    page.keyboard.press("ArrowLeft")
    assert step.input_value() != before
    assert [url for url in asked if not url.startswith(("data:", path.as_uri()))] == []
    assert complaints == []
    context.close()
