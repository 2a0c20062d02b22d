"""Reads a snapshot of a reference store without fusedpo: python read_snapshot.py FILE.

Prints key, log-prob in nats and number of tokens of every record, each checked by its checksum.
"""

import json
import struct
import sys

table = []
for byte in range(256):  # CRC-32C
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    table.append(byte)

with open(sys.argv[1], "rb") as file:  # .safetensors: length of the header, header, columns
    header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    data = file.read()
start = {name: c["data_offsets"][0] for name, c in header.items() if name != "__metadata__"}
cut = lambda name, size, i: data[start[name] + size * i : start[name] + size * (i + 1)]  # noqa: E731
for i in range(int(header["__metadata__"]["records"])):
    key = cut("keys", 16, i)
    value = cut("logps", 8, i) + cut("num_tokens", 4, i)
    crc = 0xFFFFFFFF
    for byte in key + value:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    masked = ((~crc & 0xFFFFFFFF) >> 15 | (~crc & 0xFFFFFFFF) << 17) + 0xA282EAD8 & 0xFFFFFFFF
    assert masked.to_bytes(4, "little") == cut("crc32c", 4, i), "damaged"
    print(key.hex(), *struct.unpack("<dI", value))
