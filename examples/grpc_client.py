"""The same question over gRPC, with a deadline. `grpcurl -plaintext HOST:PORT list` shows the service as well.

python examples/grpc_client.py [127.0.0.1:50051]
"""

import sys

import grpc

from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
chat = pb.Chat(messages=[pb.Message(role="user", content="What is the capital of France?")])
request = pb.GenerateRequest(chat=chat, sampling=pb.Sampling(temperature=0, max_tokens=32))
with grpc.insecure_channel(address) as channel:
    try:
        for response in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60):
            print(response.delta.text, end="", flush=True)
    except grpc.RpcError as error:
        sys.exit(error.details())
print()
print(response.done)
