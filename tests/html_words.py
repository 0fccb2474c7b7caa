"""Reads a stored output as a reader without scripts does."""

import json
from html.parser import HTMLParser


class Words(HTMLParser):
    """The words of a page, and the JSON in it."""

    def __init__(self, page):
        super().__init__()
        self.words, self.data, self.inside = [], None, ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "script":
            self.data = json.loads(data)
        else:
            self.words.append(data)
