package capabilities

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
)

func FuzzParseRelPath(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParseRelPath(s)
		if err != nil {
			if !p.IsZero() {
				t.Fatalf("%q is refused and returned: %q", s, p)
			}
			return
		}
		if p.String() != s {
			t.Fatalf("%q became %q", s, p)
		}
		if back := "/" + strings.Join(components(p), "/"); back != s {
			t.Fatalf("the components of %q make %q", s, back)
		}
		// What the kernel resolves must be local, and already in its shortest
		// form.
		if rel := p.Rel(); !filepath.IsLocal(rel) || filepath.Clean(rel) != rel || strings.ContainsRune(rel, 0) {
			t.Fatalf("%q is resolved as %q", s, rel)
		}
	})
}

func FuzzParseSpelling(f *testing.F) {
	kinds := NewKinds(FS{})
	r := names{"work": testPartitions[0]}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := kinds.Parse(s, r)
		if err != nil {
			return
		}
		again, err := kinds.Parse(c.String(), nil)
		if err != nil || !again.Equal(c) || again.String() != c.String() {
			t.Fatalf("%q parses as %q, which parses as %q, %v", s, c, again, err)
		}
		// The path is verbatim: it ends the spelling that was given.
		if path := c.Resource.(FSResource).Path.String(); !strings.HasSuffix(s, ":"+path) {
			t.Fatalf("%q became path %q", s, path)
		}
	})
}

func FuzzDecodeJSON(f *testing.F) {
	kinds := NewKinds(FS{})
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := kinds.DecodeJSON(data)
		if err != nil {
			return
		}
		canonical, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		again, err := kinds.DecodeJSON(canonical)
		if err != nil || !again.Equal(c) {
			t.Fatalf("%s decodes as %q, which decodes as %q, %v", data, c, again, err)
		}
		// The standard library's reader must see the same capability.
		var loose struct {
			Resource struct {
				Partition uuid.UUID
				Path      string
			}
			Rights []string
		}
		r := c.Resource.(FSResource)
		if err := json.Unmarshal(data, &loose); err != nil || loose.Resource.Partition != r.PartitionID ||
			loose.Resource.Path != r.Path.String() || !c.Rights.Equal(loose.Rights) {
			t.Fatalf("%s is %q here and %+v elsewhere, %v", data, c, loose, err)
		}
	})
}

func FuzzParseToken(f *testing.F) {
	fix := newFixture(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = Token(data).String() // must not panic
		p, err := fix.kinds.ParseToken(data)
		if err != nil {
			return
		}
		if err := fix.kinds.sameBytes(data, p); err != nil {
			t.Fatal(err)
		}
		if Token(data).String() != p.Grant().String() {
			t.Fatalf("prints %s, is of grant %s", Token(data), p.Grant())
		}
		// Minted again, everything but the key and the signature is the same.
		minted, err := NewSigner(testKey("broker"), p.claims.Issuer).Mint(p.claims)
		if err != nil {
			t.Fatalf("what parses cannot be minted: %v", err)
		}
		again, err := fix.kinds.ParseToken(minted)
		if err != nil || !bytes.Equal(again.message.Payload, p.message.Payload) || !sameClaims(again.claims, p.claims) {
			t.Fatalf("minted again it is another token, %v", err)
		}
		// Nobody but the key's holder makes a token that verifies.
		v, err := fix.verifier.Verify(p, time.Unix(p.claims.IssuedAt.Unix(), 0))
		if err == nil && !bytes.Equal(minted, data) {
			t.Fatalf("a forged token verifies: %+v", v.Claims())
		}
	})
}

func FuzzTokenText(f *testing.F) {
	f.Fuzz(func(t *testing.T, text []byte) {
		var token Token
		if err := token.UnmarshalText(text); err != nil {
			return
		}
		if again, err := token.MarshalText(); err != nil || !bytes.Equal(again, text) {
			t.Fatalf("%q is read and written as %q, %v", text, again, err)
		}
	})
}

// A fuzz target without seeds explores nothing when it runs as a test.
func TestFuzzCorporaAreNotEmpty(t *testing.T) {
	source, err := os.ReadFile("fuzz_test.go")
	if err != nil {
		t.Fatal(err)
	}
	targets := 0
	for line := range strings.Lines(string(source)) {
		name, ok := strings.CutPrefix(line, "func Fuzz")
		if !ok {
			continue
		}
		targets++
		name, _, _ = strings.Cut("Fuzz"+name, "(")
		entries, err := os.ReadDir(filepath.Join("testdata", "fuzz", name))
		if err != nil || len(entries) == 0 {
			t.Errorf("%s has no committed corpus: %v", name, err)
		}
	}
	if targets == 0 {
		t.Error("no fuzz targets found")
	}
}
