// Writes and deletes the objects of a directory, and tells what is known of their bytes (nginx with njs 0.7.9).
//
// Rules:
// * A body is complete on the disk before anything else happens; it gets its name by rename, so objects appear whole.
// * An object is never overwritten. Look and rename happen in one go under a lock, a directory that only one can make, so that of
//   two PUTs at once one gets 412. A crash of the machine in these microseconds leaves the lock: that one key then answers 409
//   until somebody removes .broker/locks/NAME.
// * The digest of a body is computed here and compared with what the token binds ($bound_digest); HEAD and GET tell the SHA-256
//   (Repr-Digest, RFC 9530) while size and modification time are those of then.
// * A worker serves others between two pieces that it hashes. Nothing is synced: what was acknowledged may be lost with the power.

import fs from 'fs';
import hashes from 'crypto';

var PIECE = 1 << 20;
var META = /^x-broker-meta-([a-z0-9-]{1,64})$/;
var MAX_META = 2048;

async function write(r) {
    var done;
    try {
        done = r.variables.request_method === 'DELETE' ? remove(place(r)) : await put(r, place(r));
    } catch (e) {
        done = {status: e.code === 'ENOSPC' || e.code === 'EDQUOT' ? 507 : 500, reason: 'the disk failed'};
    }
    if (done.reason) {
        r.variables.refusal = done.status + ' ' + done.reason;
        r.headersOut['Content-Type'] = 'application/problem+json';
        r.return(done.status, JSON.stringify({title: r.variables.refusal, status: done.status}) + '\n');
        return;
    }
    if (done.sha256) {
        r.headersOut['Repr-Digest'] = reprDigest(done.sha256);
    }
    r.return(done.status);
}

// Where the object of a request lies, and what belongs to it.
function place(r) {
    var root = r.variables.document_root, path = r.variables.served;
    var name = hashes.createHash('sha256').update(path).digest('hex');
    return {root: root, file: root + path, directory: (root + path).replace(/\/[^\/]+$/, ''),
            record: root + '/.broker/records/' + name, lock: root + '/.broker/locks/' + name};
}

async function put(r, at) {
    var body = r.variables.request_body_file, metadata = metadataOf(r), bound = r.variables.bound_digest;
    if (metadata === undefined) {
        return {status: 400, reason: 'metadata has names of a-z, 0-9 and -, and 2048 printable characters in all'};
    }
    if (!body) {
        return {status: 400, reason: 'the body is empty'};
    }
    var digests = await digestsOf(body, bound.startsWith('md5:') ? ['sha256', 'md5'] : ['sha256']);
    if (bound && digests[bound.split(':')[0]] !== bound.split(':')[1]) {
        return {status: 400, reason: "the body's digest is not the one that the token binds"};
    }
    return locked(at, function () {
        if (exists(at.file)) {
            return {status: 412, reason: 'an object is there already; objects are never overwritten'};
        }
        if (!settle(body, at)) {
            return {status: 409, reason: 'an object is in the way of the path'};
        }
        var seen = fs.lstatSync(at.file);
        var known = {size: seen.size, mtime: seen.mtimeMs, sha256: digests.sha256, metadata: metadata};
        fs.writeFileSync(at.record, JSON.stringify(known));
        return {status: 201, sha256: digests.sha256};
    });
}

// Rename `body` to its place. Whoever deletes the last object of a directory may remove it meanwhile, so twice.
function settle(body, at) {
    for (var attempt = 0; attempt < 3; attempt++) {
        try {
            fs.mkdirSync(at.directory, {recursive: true, mode: 0o755});
        } catch (e) {
            if (e.code === 'EEXIST' || e.code === 'ENOTDIR') {
                if (!isDirectory(at.directory)) {
                    return false;
                }
            } else if (e.code !== 'ENOENT') {
                throw e;
            }
        }
        try {
            // A link on the way would lead out of the root.
            if (fs.realpathSync(at.directory) !== fs.realpathSync(at.root) + at.directory.slice(at.root.length)) {
                return false;
            }
            fs.renameSync(body, at.file);
            return true;
        } catch (e) {
            if (e.code !== 'ENOENT') {
                throw e;
            }
        }
    }
    return false;
}

function remove(at) {
    return locked(at, function () {
        var seen;
        try {
            seen = fs.lstatSync(at.file);
        } catch (e) {
            return {status: 404, reason: 'no such object'};
        }
        if (!seen.isFile() || fs.realpathSync(at.file) !== fs.realpathSync(at.root) + at.file.slice(at.root.length)) {
            return {status: 404, reason: 'no such object'};
        }
        fs.unlinkSync(at.file);
        try {
            fs.unlinkSync(at.record);
        } catch (e) { /* an object that came another way has none */ }
        for (var directory = at.directory; directory.length > at.root.length; directory = directory.replace(/\/[^\/]+$/, '')) {
            try {
                fs.rmdirSync(directory);
            } catch (e) {
                break; // others have objects there
            }
        }
        return {status: 204};
    });
}

// Nothing in `work` waits, so a worker holds a lock for microseconds.
function locked(at, work) {
    for (var attempt = 0; ; attempt++) {
        try {
            fs.mkdirSync(at.lock);
            break;
        } catch (e) {
            if (e.code !== 'EEXIST') {
                throw e;
            }
            if (attempt === 1000) {
                return {status: 409, reason: 'another request writes this object'};
            }
        }
    }
    try {
        return work();
    } finally {
        fs.rmdirSync(at.lock);
    }
}

// Lowercase hex by name. Memory of njs is freed at the end of a request, so one buffer serves for all pieces.
async function digestsOf(file, names) {
    var descriptor = fs.openSync(file, 'r'), piece = Buffer.alloc(PIECE), position = 0, count, i, digests = {};
    var running = names.map(function (name) { return hashes.createHash(name); });
    try {
        while ((count = fs.readSync(descriptor, piece, 0, PIECE, position)) > 0) {
            for (i = 0; i < running.length; i++) {
                running[i].update(count === PIECE ? piece : piece.slice(0, count));
            }
            position += count;
            await new Promise(function (resolve) { setTimeout(resolve, 0); });
        }
    } finally {
        fs.closeSync(descriptor);
    }
    names.forEach(function (name, at) { digests[name] = running[at].digest('hex'); });
    return digests;
}

// X-Broker-Meta-NAME by name; undefined when it is not acceptable.
function metadataOf(r) {
    var found = {}, size = 0, fields = r.rawHeadersIn;
    for (var i = 0; i < fields.length; i++) {
        var name = fields[i][0].toLowerCase(), value = fields[i][1], match = META.exec(name);
        if (!name.startsWith('x-broker-meta-')) {
            continue;
        }
        if (!match || found[match[1]] !== undefined || !/^[\x20-\x7e]*$/.test(value)) {
            return undefined;
        }
        found[match[1]] = value;
        size += match[1].length + value.length;
    }
    return size > MAX_META ? undefined : found;
}

// js_header_filter of GET and HEAD.
function tell(r) {
    if (r.status !== 200 && r.status !== 206 && r.status !== 304) {
        return;
    }
    try {
        var at = place(r), known = JSON.parse(fs.readFileSync(at.record).toString()), seen = fs.lstatSync(at.file);
        if (seen.size === known.size && seen.mtimeMs === known.mtime) {
            r.headersOut['Repr-Digest'] = reprDigest(known.sha256);
        }
        Object.keys(known.metadata).forEach(function (name) { r.headersOut['X-Broker-Meta-' + name] = known.metadata[name]; });
    } catch (e) { /* an object that came another way has no record */ }
}

function reprDigest(hex) {
    return 'sha-256=:' + Buffer.from(hex, 'hex').toString('base64') + ':';
}

function exists(file) {
    try {
        fs.lstatSync(file);
        return true;
    } catch (e) {
        return false;
    }
}

function isDirectory(file) {
    try {
        return fs.lstatSync(file).isDirectory();
    } catch (e) {
        return false;
    }
}

export default {write, tell};
