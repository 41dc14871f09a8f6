package capabilities

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
)

// vectorErrors are the names that the vectors use for this package's errors.
var vectorErrors = map[string]error{
	"malformed":   ErrTokenMalformed,
	"unknown_key": ErrTokenUnknownKey,
	"signature":   ErrTokenSignature,
	"issuer":      ErrTokenIssuer,
	"epoch":       ErrTokenEpoch,
	"expired":     ErrTokenExpired,
	"holder":      ErrTokenHolder,

	"spelling":          ErrSpelling,
	"encoding":          ErrEncoding,
	"unknown_kind":      ErrUnknownKind,
	"unknown_partition": ErrUnknownPartition,
	"rights":            ErrRights,
	"resource":          ErrResource,

	"not_absolute":       ErrPathNotAbsolute,
	"too_long":           ErrPathTooLong,
	"component_too_long": ErrPathComponentTooLong,
	"nul":                ErrPathNUL,
	"not_utf8":           ErrPathNotUTF8,
	"empty_component":    ErrPathEmptyComponent,
	"dot":                ErrPathDot,
	"dot_dot":            ErrPathDotDot,
}

// wantOnly fails unless err is the named error and, where it refuses a token,
// no other reason to refuse one.
func wantOnly(t *testing.T, err error, name string) {
	t.Helper()
	want, ok := vectorErrors[name]
	if !ok {
		t.Fatalf("the vectors use an error %q that this test does not know", name)
	}
	if !errors.Is(err, want) {
		t.Fatalf("got error %v, want %v", err, want)
	}
	for other, e := range vectorErrors {
		if other != name && strings.HasPrefix(e.Error(), "token") && errors.Is(err, e) {
			t.Fatalf("error %v is %s as well as %s", err, other, name)
		}
	}
}

func readVectors(t *testing.T, name string, into any) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("..", "test", "vectors", name))
	if err != nil {
		t.Fatal(err)
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		t.Fatal(err)
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

type tokenVectors struct {
	Comment     string `json:"comment"`
	ExternalAAD string `json:"external_aad"`
	Keys        []struct {
		Name, Seed, Public, KID string
	} `json:"keys"`
	Verifier struct {
		Issuer string
		Epoch  uint64
		Keys   []string
		Now    int64
	} `json:"verifier"`
	Vectors []tokenVector `json:"vectors"`
}

type tokenVector struct {
	Name    string    `json:"name"`
	Comment string    `json:"comment"`
	Token   string    `json:"token"`
	By      uuid.UUID `json:"presented_by"`
	Error   string    `json:"error"`
	Key     string    `json:"key"`
	Claims  *struct {
		Issuer     string    `json:"issuer"`
		Holder     uuid.UUID `json:"holder"`
		Grant      uuid.UUID `json:"grant"`
		Parent     uuid.UUID `json:"parent"`
		IssuedAt   int64     `json:"issued_at"`
		Expiry     int64     `json:"expiry"`
		Epoch      uint64    `json:"epoch"`
		Capability string    `json:"capability"`
	} `json:"claims"`
}

// malformedBecause says, for malformed vectors, what the refusal must be about.
// Each has one fault, and this shows that it is the one that was found.
var malformedBecause = map[string]string{
	"empty":                    "COSE_Sign1_Tagged",
	"not-cbor":                 "COSE_Sign1_Tagged",
	"untagged":                 "COSE_Sign1_Tagged",
	"wrong-tag":                "COSE_Sign1_Tagged",
	"cwt-tag":                  "COSE_Sign1_Tagged",
	"non-minimal-tag":          "COSE_Sign1_Tagged",
	"trailing-byte":            "extraneous data",
	"truncated":                "unexpected EOF",
	"twice":                    "extraneous data",
	"three-parts":              "COSE_Sign1_Tagged",
	"five-parts":               "COSE_Sign1_Tagged",
	"indefinite-array":         "COSE_Sign1_Tagged",
	"non-minimal-array":        "COSE_Sign1_Tagged",
	"non-minimal-payload":      "token is not in its one encoding",
	"non-minimal-protected":    "protected header is not exactly",
	"detached":                 "EOF",
	"chunked-payload":          "indefinite-length",
	"short-signature":          "signature is not 64 bytes",
	"long-signature":           "signature is not 64 bytes",
	"kid-unprotected":          "no kid",
	"alg-unprotected":          "protected header is not exactly",
	"kid-in-both":              "unprotected header is not the empty map",
	"added-unprotected":        "unprotected header is not the empty map",
	"non-minimal-unprotected":  "unprotected header is not the empty map",
	"indefinite-unprotected":   "indefinite-length",
	"added-protected":          "protected header is not exactly",
	"added-critical":           "protected header is not exactly",
	"duplicate-header":         "duplicate",
	"unsorted-headers":         "protected header is not exactly",
	"no-kid":                   "no kid",
	"no-alg":                   "protected header is not exactly",
	"no-headers":               "no kid",
	"short-kid":                "no kid of 8 bytes",
	"text-kid":                 "require bstr type",
	"other-alg":                "protected header is not exactly",
	"non-minimal-alg":          "protected header is not exactly",
	"trailing-in-protected":    "extraneous data",
	"trailing-in-claims":       "extraneous data",
	"too-long":                 "longer than 8192 bytes",
	"duplicate-claim":          "duplicate map key",
	"duplicate-claim-later":    "duplicate map key",
	"unknown-claim":            "unknown field",
	"unknown-private-claim":    "unknown field",
	"text-claim":               "unknown field",
	"unsorted-claims":          "claims are not in their one encoding",
	"indefinite-claims":        "indefinite-length",
	"claims-array":             "cannot unmarshal array",
	"claims-empty":             "issuer is empty",
	"claims-nothing":           "EOF",
	"claims-tagged":            "tag",
	"no-issuer":                "issuer is empty",
	"null-issuer":              "issuer is empty",
	"no-holder":                "holder is not a UUID",
	"null-holder":              "holder is not a UUID",
	"no-issued":                "issue time is out of range",
	"null-issued":              "issue time is out of range",
	"no-grant":                 "grant is not 16 bytes",
	"null-grant":               "grant is not 16 bytes",
	"no-epoch":                 "claims are not in their one encoding",
	"null-epoch":               "claims are not in their one encoding",
	"no-capability":            "unknown kind",
	"null-capability":          "unknown kind",
	"null-expiry":              "claims are not in their one encoding",
	"zero-expiry":              "claims are not in their one encoding",
	"negative-expiry":          "expiry is out of range",
	"huge-expiry":              "expiry is out of range",
	"overflowing-expiry":       "cannot unmarshal",
	"early-expiry":             "expires before it was issued",
	"float-expiry":             "cannot unmarshal",
	"text-expiry":              "cannot unmarshal",
	"tagged-expiry":            "tag",
	"non-minimal-expiry":       "claims are not in their one encoding",
	"zero-issued":              "issue time is out of range",
	"non-minimal-epoch":        "claims are not in their one encoding",
	"negative-epoch":           "cannot unmarshal",
	"empty-issuer":             "issuer is empty",
	"uri-issuer":               "issuer is empty, too long or a URI",
	"long-issuer":              "issuer is empty, too long or a URI",
	"not-utf8-issuer":          "UTF-8",
	"bytes-issuer":             "cannot unmarshal",
	"chunked-issuer":           "indefinite-length",
	"upper-case-holder":        "holder is not a UUID in its canonical form",
	"urn-holder":               "holder is not a UUID in its canonical form",
	"zero-holder":              "no holder",
	"bytes-holder":             "cannot unmarshal",
	"short-grant":              "grant is not 16 bytes",
	"zero-grant":               "no grant",
	"text-grant":               "cannot unmarshal",
	"zero-parent":              "parent is zero",
	"empty-parent":             "parent is not 16 bytes",
	"short-parent":             "parent is not 16 bytes",
	"own-parent":               "its own parent",
	"unknown-kind":             "unknown kind",
	"reserved-provider":        "(provider) is reserved",
	"reserved-except":          "(except) is reserved",
	"null-provider":            "(provider) is reserved",
	"unknown-capability-key":   "unknown field",
	"duplicate-capability-key": "duplicate map key",
	"no-kind":                  "unknown kind",
	"no-resource":              "resource",
	"no-rights":                "not a set of rights",
	"empty-rights":             "not a set of rights",
	"write-only":               "not a set of rights",
	"unsorted-rights":          "not a set of rights",
	"duplicate-rights":         "not a set of rights",
	"unknown-right":            "not a set of rights",
	"many-rights":              "exceeded max number of elements",
	"resource-unknown-key":     "unknown field",
	"resource-duplicate-key":   "duplicate map key",
	"resource-unsorted":        "claims are not in their one encoding",
	"resource-non-minimal":     "claims are not in their one encoding",
	"resource-text":            "cannot unmarshal",
	"resource-no-path":         "does not begin with",
	"zero-partition":           "no partition",
	"short-partition":          "partition is not 16 bytes",
	"text-partition":           "cannot unmarshal",
	"path-dot-dot":             `".." as a component`,
	"path-dot":                 `"." as a component`,
	"path-relative":            "does not begin with",
	"path-empty-component":     "empty component",
	"path-nul":                 "NUL",
	"path-not-utf8":            "UTF-8",
	"path-too-long":            "is longer than 4096 bytes",
	"path-component-too-long":  "component longer than 255 bytes",
	"path-bytes":               "cannot unmarshal",
	"deep-resource":            "exceeded max nested level",
}

func TestTokenVectors(t *testing.T) {
	var file tokenVectors
	readVectors(t, "tokens.json", &file)
	if file.ExternalAAD != string(tokenAAD) {
		t.Errorf("external AAD is %q, the vectors say %q", tokenAAD, file.ExternalAAD)
	}
	private := make(map[string]ed25519.PrivateKey)
	for _, k := range file.Keys {
		key := ed25519.NewKeyFromSeed(unhex(t, k.Seed))
		public := key.Public().(ed25519.PublicKey)
		if !bytes.Equal(public, unhex(t, k.Public)) || !bytes.Equal(KeyID(public), unhex(t, k.KID)) {
			t.Errorf("key %s: public key or kid differ from the vectors'", k.Name)
		}
		private[k.Name] = key
	}
	var known []ed25519.PublicKey
	for _, name := range file.Verifier.Keys {
		known = append(known, private[name].Public().(ed25519.PublicKey))
	}
	kinds := NewKinds(FS{})
	verifier := NewVerifier(file.Verifier.Issuer, file.Verifier.Epoch, known...)
	now := time.Unix(file.Verifier.Now, 0)
	cache := NewVerifyCache(kinds, verifier, 4)
	reasons := make(map[string]int)

	for _, v := range file.Vectors {
		t.Run(v.Name, func(t *testing.T) {
			token := Token(unhex(t, v.Token))
			verified, err := verifyFor(kinds, verifier, token, v.By, now)
			for range 2 { // the second time it may come from the cache
				again, cacheErr := cache.Verify(token, now)
				if cacheErr == nil {
					cacheErr = again.For(v.By)
				}
				if (err == nil) != (cacheErr == nil) || err != nil && err.Error() != cacheErr.Error() {
					t.Errorf("the cache says %v, without it %v", cacheErr, err)
				}
			}
			if v.Error != "" {
				reasons[v.Error]++
				wantOnly(t, err, v.Error)
				if v.Error == "malformed" {
					because, ok := malformedBecause[v.Name]
					if !ok || !strings.Contains(err.Error(), because) {
						t.Errorf("refused because %q, want because %q", err, because)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			c, err := kinds.Parse(v.Claims.Capability, nil)
			if err != nil {
				t.Fatal(err)
			}
			want := Claims{
				Issuer: v.Claims.Issuer, Holder: v.Claims.Holder, Grant: v.Claims.Grant, Parent: v.Claims.Parent,
				IssuedAt: time.Unix(v.Claims.IssuedAt, 0).UTC(), Epoch: v.Claims.Epoch, Capability: c,
			}
			if v.Claims.Expiry != 0 {
				want.Expiry = time.Unix(v.Claims.Expiry, 0).UTC()
			}
			if got := verified.Claims(); !sameClaims(got, want) {
				t.Errorf("claims are\n%+v, want\n%+v", got, want)
			}
			minted, err := NewSigner(private[v.Key], want.Issuer).Mint(want)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(minted, token) {
				t.Errorf("minting gives\n%x, the vector is\n%x", []byte(minted), []byte(token))
			}
		})
	}
	for name := range malformedBecause {
		if !hasVector(file.Vectors, name) {
			t.Errorf("this test expects a vector %s, which is gone", name)
		}
	}
	for _, reason := range []string{"malformed", "unknown_key", "signature", "issuer", "epoch", "expired", "holder"} {
		if reasons[reason] == 0 {
			t.Errorf("no vector is refused as %s", reason)
		}
	}
}

func hasVector(vectors []tokenVector, name string) bool {
	for _, v := range vectors {
		if v.Name == name {
			return true
		}
	}
	return false
}

func verifyFor(k *Kinds, v *Verifier, token Token, by uuid.UUID, now time.Time) (*Verified, error) {
	p, err := k.ParseToken(token)
	if err != nil {
		return nil, err
	}
	verified, err := v.Verify(p, now)
	if err != nil {
		return nil, err
	}
	if err := verified.For(by); err != nil {
		return nil, err
	}
	return verified, nil
}

func sameClaims(a, b Claims) bool {
	return a.Issuer == b.Issuer && a.Holder == b.Holder && a.Grant == b.Grant && a.Parent == b.Parent &&
		a.IssuedAt.Equal(b.IssuedAt) && a.Expiry.Equal(b.Expiry) && a.Epoch == b.Epoch && a.Capability.Equal(b.Capability)
}

type names map[string]uuid.UUID

func (n names) Partition(name string) (uuid.UUID, error) {
	if id, ok := n[name]; ok {
		return id, nil
	}
	return uuid.Nil, ErrUnknownPartition
}

func TestCapabilityVectors(t *testing.T) {
	var file struct {
		Comment string
		Names   names
		Paths   []struct{ Name, Path, Rel, Error string }

		Spellings []struct{ Spelling, Canonical, JSON, Error string }
		Encodings []struct{ Name, JSON, Error string }
		Covers    []struct {
			Parent, Child string
			Covers        bool
		}
	}
	readVectors(t, "capabilities.json", &file)
	kinds := NewKinds(FS{})

	for _, v := range file.Paths {
		t.Run("path/"+v.Name, func(t *testing.T) {
			text := string(unhex(t, v.Path))
			p, err := ParseRelPath(text)
			if v.Error != "" {
				wantOnly(t, err, v.Error)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if p.String() != text || p.Rel() != v.Rel {
				t.Errorf("path is %q and %q, want %q and %q", p.String(), p.Rel(), text, v.Rel)
			}
		})
	}
	for _, v := range file.Spellings {
		t.Run("spelling/"+v.Spelling, func(t *testing.T) {
			c, err := kinds.Parse(v.Spelling, file.Names)
			if v.Error != "" {
				wantOnly(t, err, v.Error)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if c.String() != v.Canonical {
				t.Errorf("canonical spelling is %s, want %s", c, v.Canonical)
			}
			encoded, err := json.Marshal(c)
			if err != nil || string(encoded) != v.JSON {
				t.Errorf("JSON is %s, %v, want %s", encoded, err, v.JSON)
			}
			back, err := kinds.DecodeJSON([]byte(v.JSON))
			if err != nil || !back.Equal(c) {
				t.Errorf("decoding gives %s, %v, want %s", back, err, c)
			}
		})
	}
	for _, v := range file.Encodings {
		t.Run("encoding/"+v.Name, func(t *testing.T) {
			_, err := kinds.DecodeJSON(unhex(t, v.JSON))
			wantOnly(t, err, v.Error)
		})
	}
	for _, v := range file.Covers {
		t.Run("covers/"+v.Parent+" "+v.Child, func(t *testing.T) {
			parent, err := kinds.Parse(v.Parent, nil)
			if err != nil {
				t.Fatal(err)
			}
			child, err := kinds.Parse(v.Child, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := kinds.Covers(parent, child); got != v.Covers {
				t.Errorf("Covers is %v, want %v", got, v.Covers)
			}
		})
	}
}
