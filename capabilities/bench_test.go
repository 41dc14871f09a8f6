package capabilities

import (
	"crypto/ed25519"
	"testing"

	"github.com/fxamacker/cbor/v2"
)

// The probes sign and check exactly what a token signs, with nothing around
// it; the rows of docs/performance.md are ratios to them.

func signedBytes(b *testing.B, f fixture, token Token) []byte {
	b.Helper()
	p, err := f.kinds.ParseToken(token)
	if err != nil {
		b.Fatal(err)
	}
	message, err := cbor.Marshal([]any{"Signature1", p.message.Headers.RawProtected, tokenAAD, p.message.Payload})
	if err != nil {
		b.Fatal(err)
	}
	return message
}

func BenchmarkEd25519Sign(b *testing.B) {
	f := newFixture(b)
	key, message := testKey("broker"), signedBytes(b, f, f.mint(b))
	b.ReportAllocs()
	for b.Loop() {
		ed25519.Sign(key, message)
	}
}

func BenchmarkMint(b *testing.B) {
	f := newFixture(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.signer.Mint(f.claims); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEd25519Verify(b *testing.B) {
	f := newFixture(b)
	key, message := testKey("broker"), signedBytes(b, f, f.mint(b))
	signature := ed25519.Sign(key, message)
	public := publicOf(key)
	b.ReportAllocs()
	for b.Loop() {
		if !ed25519.Verify(public, message, signature) {
			b.Fatal("does not verify")
		}
	}
}

// BenchmarkVerify starts from the bytes: parsing counts.
func BenchmarkVerify(b *testing.B) {
	f := newFixture(b)
	token := f.mint(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.verify(token); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerifyCached(b *testing.B) {
	f := newFixture(b)
	token := f.mint(b)
	cache := NewVerifyCache(f.kinds, f.verifier, 16)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := cache.Verify(token, f.now); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCovers(b *testing.B) {
	f := newFixture(b)
	b.ReportAllocs()
	for b.Loop() {
		f.kinds.Covers(f.claims.Capability, f.claims.Capability)
	}
}
