"""Stream an answer with tercet.Client and show where its time went.

python examples/python_client.py [http://127.0.0.1:8000]
"""

import sys

import tercet
from tercet.errors import TercetError

client = tercet.Client(*sys.argv[1:2])
try:
    with client.stream("What is the capital of France?", temperature=0, max_tokens=32) as answer:
        for piece in answer:
            print(piece, end="", flush=True)
except TercetError as error:
    sys.exit(str(error))
print()
if answer.result is not None:
    for name, value in answer.result.timings.items():
        print(f"{name:>16} {value}")
