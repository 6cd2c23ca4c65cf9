// Whether a transfer token allows a request (nginx with njs 0.7.9). Runs in the subrequest of auth_request, before the body is read.
//
// Answers 204 or 403; the real status and the reason go into $refusal, and what the token binds into $bound_digest, $token_id.
//
// Rules, those of broker.storeside.verify and schemas/claims.json:
// * ES256 and RS256 only, and only as the key itself is: the token's `alg` never chooses how a key is used. njs knows no EdDSA.
// * The key is KID.pem in $token_keys and nothing else; `kid` is a plain name. `jku`, `jwk`, `x5u` are ignored, `crit` is refused.
// * One spelling per token: base64url without padding, and segments that encode back to themselves.
// * Unknown claims are refused, so that no restriction is ever overlooked. `upl` is refused: a directory has no multipart uploads.
// * The path must be spelled so that it can be read in one way, and what nginx serves ($served) must be what the token names.
// * nbf is stretched by 5 seconds, exp not at all. GET, HEAD and DELETE have no body; a PUT states its length.

import fs from 'fs';

var LEEWAY_SECONDS = 5;
var MAX_TOKEN = 4096;
var MAX_INSTANT = 1099511627776;
var MAX_BYTES = 9007199254740992;

var COMPACT = /^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+$/;
var KID = /^[A-Za-z0-9_-]{1,128}$/;
var NAME = /^[^\x00-\x1f\x7f]{1,255}$/;
var PATH = /^\/[^\x00-\x1f\x7f]{0,1023}$/;
var DIGEST = /^(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})$/;
var METHODS = ['GET', 'PUT', 'POST', 'DELETE'];
var CLAIMS = ['iss', 'aud', 'sub', 'exp', 'nbf', 'jti', 'mth', 'path', 'len', 'dig', 'upl', 'off'];

// RFC 3986: segments of pchar, without ";" which some servers cut at.
var SPELLED = /^(\/([A-Za-z0-9._~!$&'()*+,=:@-]|%[2-9A-Fa-f][0-9A-Fa-f])+)+$/;
// Encoded slash, backslash, dot and DEL; what a second decoding would change; dot segments.
var AMBIGUOUS = /%2[eEfF]|%5[cC]|%7[fF]|%25[0-9A-Fa-f][0-9A-Fa-f]|\/\.\.?(\/|$)/;

// What a public key in DER (SubjectPublicKeyInfo) begins with, or contains: P-256, uncompressed; RSA.
var P256 = '3059301306072a8648ce3d020106082a8648ce3d03010703420004';
var RSA = '06092a864886f70d010101';
var SMALLEST_RSA = 290; // bytes of DER of 2048 bits, at least

function Refused(text) {
    this.text = text;
}

async function verify(r) {
    try {
        var target = spelled(r);
        var claims = await proven(token(r, target.query), r.variables.token_keys);
        r.variables.token_id = claims.jti;
        check(claims, r, target.path);
        r.variables.bound_digest = claims.dig || '';
        r.return(204);
    } catch (e) {
        // Other errors name what failed here; their text might quote the token.
        r.variables.refusal = e instanceof Refused ? e.text : '401 the token is malformed';
        r.return(403);
    }
}

// The decoded path and the query, from the request as it came.
function spelled(r) {
    var raw = r.variables.request_uri, at = raw.indexOf('?');
    var path = at < 0 ? raw : raw.slice(0, at);
    if (!SPELLED.test(path) || AMBIGUOUS.test(path)) {
        throw new Refused('400 the path is malformed or can be read in two ways');
    }
    try {
        path = decodeURIComponent(path);
    } catch (e) {
        throw new Refused('400 the path is not UTF-8');
    }
    if (path !== r.variables.served) {
        throw new Refused('400 the path can be read in two ways');
    }
    return {path: path, query: at < 0 ? '' : raw.slice(at + 1)};
}

function token(r, query) {
    var found = [], fields = r.rawHeadersIn, i, match;
    if (query !== '') {
        match = /^token=([A-Za-z0-9._-]+)$/.exec(query);
        if (!match) {
            throw new Refused('400 the query may hold one token, nothing else');
        }
        found.push(match[1]);
    }
    for (i = 0; i < fields.length; i++) {
        if (fields[i][0].toLowerCase() === 'authorization') {
            match = /^[Bb][Ee][Aa][Rr][Ee][Rr] +([^ ]+) *$/.exec(fields[i][1]);
            if (!match) {
                throw new Refused('401 a bearer token is required');
            }
            found.push(match[1]);
        }
    }
    if (found.length === 0) {
        throw new Refused('401 a token is required');
    }
    if (found.length > 1) {
        throw new Refused('400 more than one token');
    }
    return found[0];
}

// The claims, once the signature has been found right.
async function proven(text, directory) {
    if (text.length > MAX_TOKEN || !COMPACT.test(text)) {
        throw new Refused('401 the token is malformed');
    }
    var parts = text.split('.');
    var meta = object(parts[0]);
    if (meta.crit !== undefined || meta.b64 !== undefined || typeof meta.kid !== 'string' || !KID.test(meta.kid)) {
        throw new Refused("401 the token's header is not acceptable");
    }
    var signature = Buffer.from(parts[2], 'base64url');
    if (signature.toString('base64url') !== parts[2]) {
        throw new Refused('401 the token is malformed');
    }
    var key = load(directory, meta.kid);
    var kind = kindOf(key);
    if (kind === undefined || meta.alg !== kind.alg) {
        throw new Refused("401 the token's algorithm is not its key's");
    }
    var right = false;
    try {
        var opened = await crypto.subtle.importKey('spki', key, kind.key, false, ['verify']);
        right = await crypto.subtle.verify(kind.verify, opened, signature, parts[0] + '.' + parts[1]);
    } catch (e) {
        right = false;
    }
    if (right !== true) {
        throw new Refused("401 the token's signature is wrong");
    }
    return wellFormed(object(parts[1]));
}

function load(directory, kid) {
    try {
        return Buffer.from(fs.readFileSync(directory + '/' + kid + '.pem').toString().replace(/-----[^-]+-----|\s/g, ''), 'base64');
    } catch (e) {
        throw new Refused("401 the token's key is unknown");
    }
}

// What the key is for, by the key alone.
function kindOf(key) {
    var hex = key.toString('hex');
    if (hex.startsWith(P256) && key.length === 91) {
        return {alg: 'ES256', key: {name: 'ECDSA', namedCurve: 'P-256'}, verify: {name: 'ECDSA', hash: 'SHA-256'}};
    }
    if (hex.slice(0, 64).indexOf(RSA) > 0 && key.length >= SMALLEST_RSA) {
        return {alg: 'RS256', key: {name: 'RSASSA-PKCS1-v1_5', hash: 'SHA-256'}, verify: {name: 'RSASSA-PKCS1-v1_5'}};
    }
    return undefined;
}

function object(segment) {
    var bytes = Buffer.from(segment, 'base64url');
    if (bytes.toString('base64url') !== segment) {
        throw new Refused('401 the token is malformed');
    }
    var value = JSON.parse(bytes.toString());
    if (typeof value !== 'object' || value === null || Array.isArray(value)) {
        throw new Refused('401 the token is malformed');
    }
    return value;
}

// The claims, if schemas/claims.json allows them.
function wellFormed(c) {
    var good = Object.keys(c).every(function (name) { return CLAIMS.indexOf(name) >= 0; })
        && matches(NAME, c.iss) && matches(NAME, c.aud) && matches(NAME, c.sub) && matches(NAME, c.jti)
        && number(c.exp, MAX_INSTANT) && number(c.nbf, MAX_INSTANT)
        && METHODS.indexOf(c.mth) >= 0 && matches(PATH, c.path)
        && (c.len === undefined || (number(c.len, MAX_BYTES) && Math.floor(c.len) === c.len))
        && (c.dig === undefined || matches(DIGEST, c.dig));
    if (!good || ((c.len !== undefined || c.dig !== undefined) && (c.mth === 'GET' || c.mth === 'DELETE'))) {
        throw new Refused("401 the token's claims are not acceptable");
    }
    return c;
}

function matches(form, value) {
    return typeof value === 'string' && form.test(value);
}

function number(value, most) {
    return typeof value === 'number' && value >= 0 && value <= most;
}

function check(claims, r, path) {
    var now = Date.now() / 1000, method = r.variables.request_method;
    if (claims.iss !== r.variables.token_issuer) {
        throw new Refused('401 the token is from another issuer');
    }
    if (claims.aud !== r.variables.token_audience) {
        throw new Refused('401 the token is for another store');
    }
    if (now < claims.nbf - LEEWAY_SECONDS) {
        throw new Refused('401 the token is not valid yet');
    }
    if (now >= claims.exp) {
        throw new Refused('401 the token has expired');
    }
    if (claims.mth !== (method === 'HEAD' ? 'GET' : method)) {
        throw new Refused('403 the token is for another method');
    }
    if (claims.path !== path) {
        throw new Refused('403 the token is for another path');
    }
    if (claims.upl !== undefined || claims.off !== undefined) {
        throw new Refused('403 this store has no multipart uploads');
    }
    if (method === 'PUT') {
        checkBody(claims, r);
    } else if (r.variables.http_transfer_encoding || Number(r.variables.http_content_length || 0) > 0) {
        throw new Refused('400 a ' + method + ' has no body');
    }
}

function checkBody(claims, r) {
    var length = r.variables.http_content_length;
    if (r.variables.http_transfer_encoding || !length) {
        throw new Refused('411 the length of the body must be stated');
    }
    if (claims.len !== undefined && length !== String(claims.len)) {
        throw new Refused('400 the body is not as long as the token says');
    }
    if (r.variables.http_content_range) {
        throw new Refused('400 a PUT holds the whole');
    }
    if ((r.variables.http_content_encoding || 'identity') !== 'identity') {
        throw new Refused('415 bodies are stored as they are, without a content coding');
    }
    try {
        fs.lstatSync(r.variables.document_root + claims.path);
    } catch (e) {
        return;
    }
    throw new Refused('412 an object is there already; objects are never overwritten');
}

export default {verify};
