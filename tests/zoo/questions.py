"""Questions for models that read more than one text."""

PAIR = ("The weather in Paris", "It is nice today")

IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAMklEQVR4nGNkYGCQw4ZYGOQYGB"
    "hYMBFcggMNIUvwICM0CQE4wpQQgSCsEhIMDBK4JGQAhWkD8okPQmwAAAAASUVORK5CYII="
)
"""An image of eight by eight pixels, each of another colour."""

PICTURE = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": IMAGE}},
            {"type": "text", "text": "Who are you?"},
        ],
    }
]
