package vectors

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"slices"
)

// Major types of RFC 8949 §3.1.
const (
	majorUint  = 0
	majorNint  = 1
	majorBytes = 2
	majorText  = 3
	majorArray = 4
	majorMap   = 5
	majorTag   = 6
)

// head is the shortest head of a data item.
func head(major byte, n uint64) []byte {
	switch {
	case n < 24:
		return []byte{major<<5 | byte(n)}
	case n < 1<<8:
		return headWide(major, n, 1)
	case n < 1<<16:
		return headWide(major, n, 2)
	case n < 1<<32:
		return headWide(major, n, 4)
	}
	return headWide(major, n, 8)
}

// headWide is a head with its argument in 1, 2, 4 or 8 bytes, needed or not.
func headWide(major byte, n uint64, width int) []byte {
	info := map[int]byte{1: 24, 2: 25, 4: 26, 8: 27}[width]
	var all [8]byte
	binary.BigEndian.PutUint64(all[:], n)
	return append([]byte{major<<5 | info}, all[8-width:]...)
}

func integer(n int64) []byte {
	if n < 0 {
		return head(majorNint, uint64(-1-n))
	}
	return head(majorUint, uint64(n))
}

func byteString(b []byte) []byte { return append(head(majorBytes, uint64(len(b))), b...) }

func text(s string) []byte { return append(head(majorText, uint64(len(s))), s...) }

func array(items ...[]byte) []byte {
	return append(head(majorArray, uint64(len(items))), slices.Concat(items...)...)
}

func texts(items ...string) []byte {
	encoded := make([][]byte, 0, len(items))
	for _, s := range items {
		encoded = append(encoded, text(s))
	}
	return array(encoded...)
}

// pair is an entry of a map with an integer key.
type pair struct {
	key   int64
	value []byte
}

// mapOf keeps the order that it is given, right or wrong.
func mapOf(pairs ...pair) []byte {
	out := head(majorMap, uint64(len(pairs)))
	for _, p := range pairs {
		out = slices.Concat(out, integer(p.key), p.value)
	}
	return out
}

// signingKey is a key made from a seed that all the world knows.
type signingKey struct {
	name    string
	private ed25519.PrivateKey
}

func newKey(name string) signingKey {
	seed := sha256.Sum256([]byte("spectrum test vectors, key " + name))
	return signingKey{name, ed25519.NewKeyFromSeed(seed[:])}
}

func (k signingKey) public() ed25519.PublicKey { return k.private.Public().(ed25519.PublicKey) }

func (k signingKey) kid() []byte {
	sum := sha256.Sum256(k.public())
	return sum[:8]
}

// envelope is a COSE_Sign1 with every part open to change.
type envelope struct {
	protected   []byte // the map, before it is wrapped
	unprotected []byte
	payload     []byte
	aad         []byte
	key         signingKey
}

const aad = "spectrum-capability-token/v1"

func newEnvelope(key signingKey, payload []byte) envelope {
	return envelope{
		protected:   mapOf(pair{1, integer(-8)}, pair{4, byteString(key.kid())}),
		unprotected: mapOf(),
		payload:     payload,
		aad:         []byte(aad),
		key:         key,
	}
}

// signature signs the Sig_structure of RFC 9052 §4.4.
func (e envelope) signature() []byte {
	return ed25519.Sign(e.key.private, array(
		text("Signature1"), byteString(e.protected), byteString(e.aad), byteString(e.payload)))
}

func (e envelope) parts() [][]byte {
	return [][]byte{byteString(e.protected), e.unprotected, byteString(e.payload), byteString(e.signature())}
}

func (e envelope) bytes() []byte {
	return append(head(majorTag, 18), array(e.parts()...)...)
}
