// A Helia in a private network, for tests/helia.py: reads a command a line, as JSON, and answers each.
//
//   node peer.mjs SWARM_KEY_FILE
//   ["who"]  ["connect", MULTIADDR]  ["put", CODEC, BASE64]  ["get", CID]  ["pin", CID]

import { readFile } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import { withBitswap } from '@helia/bitswap'
import { withLibp2pLight } from '@helia/libp2p'
import * as dagCbor from '@ipld/dag-cbor'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { preSharedKey } from '@libp2p/pnet'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createHeliaLight } from 'helia'
import { CID } from 'multiformats/cid'
import { sha256 } from 'multiformats/hashes/sha2'

const CODECS = { raw: 0x55, 'dag-cbor': 0x71 }

const helia = withBitswap(withLibp2pLight(createHeliaLight({ codecs: [dagCbor] }), {
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionProtector: preSharedKey({ psk: await readFile(process.argv[2]) }),
  services: { identify: identify() }
}))
await helia.start()

async function read (cid) {
  const pieces = []
  for await (const piece of helia.blockstore.get(cid, { signal: AbortSignal.timeout(20_000) })) {
    pieces.push(piece)
  }
  return Buffer.concat(pieces)
}

const commands = {
  who: () => [helia.libp2p.peerId.toString(), helia.libp2p.getMultiaddrs()[0].toString()],
  connect: async (address) => { await helia.libp2p.dial(multiaddr(address)) },
  put: async (codec, data) => {
    const block = Buffer.from(data, 'base64')
    const cid = CID.createV1(CODECS[codec], await sha256.digest(block))
    await helia.blockstore.put(cid, block)
    return cid.toString()
  },
  get: async (cid) => (await read(CID.parse(cid))).toString('base64'),
  // Gets the block with all that it links to.
  pin: async (cid) => { for await (const _ of helia.pins.add(CID.parse(cid))) { /* each block */ } }
}

for await (const line of createInterface({ input: process.stdin })) {
  const [name, ...parameters] = JSON.parse(line)
  let answer
  try {
    answer = { result: (await commands[name](...parameters)) ?? null }
  } catch (error) {
    answer = { error: String(error) }
  }
  process.stdout.write(JSON.stringify(answer) + '\n')
}
process.exit(0)
