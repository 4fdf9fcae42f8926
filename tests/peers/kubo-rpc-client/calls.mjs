// Calls a node with the present JavaScript client of the Kubo RPC, and prints what came:
//   node calls.mjs http://127.0.0.1:7411
import { create, CID } from 'kubo-rpc-client'

const client = create({ url: `${process.argv[2]}/api/v0`, timeout: 30000 })
const LARGE = Uint8Array.from({ length: 600000 }, (_, i) => i % 251)

async function all (source) {
  const found = []
  for await (const item of source) found.push(item)
  return found
}

async function bytes (source) {
  return Buffer.concat(await all(source))
}

async function failure (call) {
  try {
    await call()
  } catch (error) {
    return `${error.name}: ${error.message}`
  }
  throw new Error('it did not fail')
}

const block = await client.block.put(Buffer.from('a block'), { format: 'raw' })
const dag = await client.dag.put({ list: [1, { deep: 'x' }], link: block })
const small = await client.add('hello\n', { cidVersion: 1 })
const large = await client.add(LARGE)
const pinned = await client.pin.add(dag)
const kinds = await all(client.pin.ls({ type: 'recursive' }))
const exported = await bytes(client.dag.export(dag))
const imported = await all(client.dag.import([exported]))

console.log(JSON.stringify({
  id: (await client.id()).id.toString(),
  version: (await client.version()).version,
  block: block.toString(),
  read: Buffer.from(await client.block.get(block)).toString(),
  size: (await client.block.stat(block)).size,
  dag: dag.toString(),
  deep: (await client.dag.get(dag, { path: '/list/1/deep' })).value,
  linked: Buffer.from((await client.dag.get(dag, { path: '/link' })).value).toString(),
  resolved: (await client.dag.resolve(dag, { path: '/list/1' })).remainderPath,
  small: small.cid.toString(),
  large: large.cid.toString(),
  cat: (await bytes(client.cat(large.cid))).equals(Buffer.from(LARGE)),
  part: (await bytes(client.cat(small.cid, { offset: 1, length: 2 }))).toString(),
  pinned: pinned.toString(),
  kinds: kinds.filter(pin => pin.cid.equals(dag)).map(pin => pin.type),
  unpinned: (await client.pin.rm(dag)).toString(),
  imported: imported.map(found => found.root.cid.toString()),
  removed: (await all(client.block.rm(block))).map(found => found.cid.toString()),
  refs: (await all(client.refs.local())).length > 3,
  objects: Number((await client.repo.stat()).numObjects) > 3,
  peers: (await client.swarm.peers()).length,
  absent: await failure(() => client.block.get(
    CID.parse('bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku'), { offline: true })),
  unknown: await failure(() => all(client.files.ls('/')))
}))
