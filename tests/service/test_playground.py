"""The page: whole, and without anything that its content security policy forbids."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient

from service.api import PAGES


@pytest.mark.parametrize(("path", "media_type"), [(path, page[1]) for path, page in PAGES.items()])
def test_every_part_comes_with_its_type_and_the_policy(client: TestClient, path: str, media_type: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == f"{media_type}; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]


def test_the_page_holds_no_inline_code_and_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/").text
    assert not re.search(r"<style|<script(?![^>]*src=)|\son\w+=|\sstyle=", page)
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [where for where in loaded if not where.startswith("data:")] == ["playground.css", "playground.js"]


def test_every_element_that_the_script_uses_is_in_the_page(client: TestClient) -> None:
    used = set(re.findall(r'at\("(\w+)"\)', client.get("/playground.js").text))
    assert used <= set(re.findall(r'id="(\w+)"', client.get("/").text))


def test_every_control_has_a_label(client: TestClient) -> None:
    page = client.get("/").text
    controls = re.findall(r'<(?:textarea|select|input) id="(\w+)"', page)
    labelled = re.findall(r'<label[^>]*>[^<]*<(?:select|input) id="(\w+)"|<label for="(\w+)"', page)
    assert sorted(controls) == sorted("".join(pair) for pair in labelled)
