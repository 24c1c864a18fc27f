"""The same question with the unmodified openai package (pip install openai).

python examples/openai_client.py [http://127.0.0.1:8000]
"""

import sys

import openai

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none") as client:
    try:
        model = client.models.list().data[0].id
    except openai.APIConnectionError as error:
        sys.exit(f"{base_url}: {error}")
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_tokens=32,
    )
    print(answer.choices[0].message.content)
    print(answer.usage)
