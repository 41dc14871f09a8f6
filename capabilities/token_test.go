package capabilities

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/veraison/go-cose"
	"pgregory.net/rapid"
)

func testKey(name string) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte(name))
	return ed25519.NewKeyFromSeed(seed[:])
}

func publicOf(key ed25519.PrivateKey) ed25519.PublicKey { return key.Public().(ed25519.PublicKey) }

func newFixture(tb testing.TB) fixture {
	tb.Helper()
	c, err := NewFS(testPartitions[0], RelPath{"/photos/2024"}, fsReadOnly)
	if err != nil {
		tb.Fatal(err)
	}
	now := time.Unix(1_750_000_000, 0).UTC()
	key := testKey("broker")
	return fixture{
		kinds:    NewKinds(FS{}),
		signer:   NewSigner(key, "broker"),
		verifier: NewVerifier("broker", 7, publicOf(key)),
		now:      now,
		claims: Claims{
			Issuer:     "broker",
			Holder:     uuid.MustParse("6f1c9a52-0b0e-4d7a-9d55-3a1f0c2b7e01"),
			Grant:      uuid.MustParse("a2b7c0de-1111-4222-8333-444455556666"),
			Parent:     uuid.MustParse("a2b7c0de-1111-4222-8333-444455556667"),
			IssuedAt:   now,
			Expiry:     now.Add(time.Hour),
			Epoch:      7,
			Capability: c,
		},
	}
}

func (f fixture) mint(tb testing.TB) Token {
	tb.Helper()
	token, err := f.signer.Mint(f.claims)
	if err != nil {
		tb.Fatal(err)
	}
	return token
}

func (f fixture) verify(token []byte) (*Verified, error) {
	return verifyFor(f.kinds, f.verifier, token, f.claims.Holder, f.now)
}

func TestMintedTokensVerify(t *testing.T) {
	f := newFixture(t)
	rapid.Check(t, func(t *rapid.T) {
		c := f.claims
		c.Capability = someFS().Draw(t, "capability")
		c.Epoch = rapid.Uint64().Draw(t, "epoch")
		if rapid.Bool().Draw(t, "no parent") {
			c.Parent = uuid.Nil
		}
		if rapid.Bool().Draw(t, "no expiry") {
			c.Expiry = time.Time{}
		}
		token, err := f.signer.Mint(c)
		if err != nil {
			t.Fatal(err)
		}
		v, err := verifyFor(f.kinds, NewVerifier("broker", c.Epoch, publicOf(testKey("broker"))), token, c.Holder, f.now)
		if err != nil {
			t.Fatal(err)
		}
		if !sameClaims(v.Claims(), c) {
			t.Fatalf("claims are\n%+v, want\n%+v", v.Claims(), c)
		}
		again, err := f.signer.Mint(v.Claims())
		if err != nil || !bytes.Equal(again, token) {
			t.Fatalf("minting again gives other bytes, %v", err)
		}
	})
}

// No bit of a token is outside the signature or the strict form.
func TestEveryBitFlipIsRefused(t *testing.T) {
	f := newFixture(t)
	whole := f.mint(t)
	counts := make(map[error]int)
	for i := range len(whole) * 8 {
		flipped := bytes.Clone(whole)
		flipped[i/8] ^= 1 << (i % 8)
		_, err := f.verify(flipped)
		known := 0
		for _, reason := range []error{ErrTokenMalformed, ErrTokenUnknownKey, ErrTokenSignature} {
			if errors.Is(err, reason) {
				counts[reason]++
				known++
			}
		}
		if known != 1 {
			t.Errorf("bit %d of byte %d flipped: %v", i%8, i/8, err)
		}
	}
	for _, reason := range []error{ErrTokenMalformed, ErrTokenUnknownKey, ErrTokenSignature} {
		if counts[reason] == 0 {
			t.Errorf("no flip is refused as %q", reason)
		}
	}
}

func TestEveryTruncationAndExtensionIsRefused(t *testing.T) {
	f := newFixture(t)
	whole := f.mint(t)
	for n := range whole {
		if _, err := f.verify(whole[:n]); !errors.Is(err, ErrTokenMalformed) {
			t.Errorf("the first %d bytes: %v", n, err)
		}
	}
	for b := range 256 {
		if _, err := f.verify(append(bytes.Clone(whole), byte(b))); !errors.Is(err, ErrTokenMalformed) {
			t.Errorf("with byte %#x after it: %v", b, err)
		}
	}
	if _, err := f.verify(make([]byte, MaxToken+1)); !errors.Is(err, ErrTokenMalformed) {
		t.Errorf("too long: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	f := newFixture(t)
	minted := func(s *Signer, change func(*Claims)) Token {
		c := f.claims
		change(&c)
		token, err := s.Mint(c)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	same := func(*Claims) {}
	// A signer whose key id is a lie.
	liar := NewSigner(testKey("other"), "broker")
	liar.headers = f.signer.headers

	for _, tc := range []struct {
		name  string
		token Token
		at    time.Time
		want  error
	}{
		{"good", f.mint(t), f.now, nil},
		{"just before expiry", f.mint(t), f.claims.Expiry.Add(-1), nil},
		{"at expiry", f.mint(t), f.claims.Expiry, ErrTokenExpired},
		{"after expiry", f.mint(t), f.claims.Expiry.Add(time.Hour), ErrTokenExpired},
		{"no expiry, much later", minted(f.signer, func(c *Claims) { c.Expiry = time.Time{} }), f.now.AddDate(50, 0, 0), nil},
		{"other key", minted(NewSigner(testKey("other"), "broker"), same), f.now, ErrTokenUnknownKey},
		{"other key, this key's id", minted(liar, same), f.now, ErrTokenSignature},
		{"other issuer", minted(NewSigner(testKey("broker"), "elsewhere"), func(c *Claims) { c.Issuer = "" }), f.now, ErrTokenIssuer},
		{"other epoch", minted(f.signer, func(c *Claims) { c.Epoch = 6 }), f.now, ErrTokenEpoch},
		{"other holder", minted(f.signer, func(c *Claims) { c.Holder = uuid.New() }), f.now, ErrTokenHolder},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := verifyFor(f.kinds, f.verifier, tc.token, f.claims.Holder, tc.at)
			if !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

// The key signs other things too: none of them is a token.
func TestOtherAADIsRefused(t *testing.T) {
	f := newFixture(t)
	p, err := f.kinds.ParseToken(f.mint(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, aad := range [][]byte{nil, {}, []byte("spectrum-capability-token/v2"), []byte("spectrum-audit-head/v1")} {
		m := cose.Sign1Message{Headers: f.signer.headers, Payload: p.message.Payload}
		if err := m.Sign(nil, aad, f.signer.signer); err != nil {
			t.Fatal(err)
		}
		other, err := m.MarshalCBOR()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.verify(other); !errors.Is(err, ErrTokenSignature) {
			t.Errorf("AAD %q: %v", aad, err)
		}
	}
}

func TestKeysRotate(t *testing.T) {
	f := newFixture(t)
	old := f.mint(t)
	f.signer = NewSigner(testKey("next"), "broker")
	fresh := f.mint(t)
	f.verifier = NewVerifier("broker", 7, publicOf(testKey("next")), publicOf(testKey("broker")), make([]byte, 3))
	for name, token := range map[string]Token{"old": old, "fresh": fresh} {
		if _, err := f.verify(token); err != nil {
			t.Errorf("%s key's token: %v", name, err)
		}
	}
	f.verifier = NewVerifier("broker", 7, publicOf(testKey("next")))
	if _, err := f.verify(old); !errors.Is(err, ErrTokenUnknownKey) {
		t.Errorf("a retired key's token: %v", err)
	}
}

func TestEmptyValuesAuthoriseNothing(t *testing.T) {
	f := newFixture(t)
	for _, p := range []*Parsed{nil, {}} {
		if _, err := f.verifier.Verify(p, f.now); !errors.Is(err, ErrTokenMalformed) {
			t.Errorf("verifying nothing: %v", err)
		}
	}
	if err := (&Verified{}).For(uuid.Nil); !errors.Is(err, ErrTokenHolder) {
		t.Errorf("an empty Verified, for nobody: %v", err)
	}
}

func TestMintRefusesNonsense(t *testing.T) {
	f := newFixture(t)
	for name, change := range map[string]func(*Claims){
		"other issuer":     func(c *Claims) { c.Issuer = "elsewhere" },
		"no holder":        func(c *Claims) { c.Holder = uuid.Nil },
		"no grant":         func(c *Claims) { c.Grant = uuid.Nil },
		"own parent":       func(c *Claims) { c.Parent = c.Grant },
		"no issue time":    func(c *Claims) { c.IssuedAt = time.Time{} },
		"early expiry":     func(c *Claims) { c.Expiry = c.IssuedAt.Add(-time.Second) },
		"ancient expiry":   func(c *Claims) { c.Expiry = time.Unix(-5, 0) },
		"no capability":    func(c *Claims) { c.Capability = Capability{} },
		"empty resource":   func(c *Claims) { c.Capability.Resource = FSResource{} },
		"far-off issue":    func(c *Claims) { c.IssuedAt = time.Unix(maxSeconds+1, 0) },
		"far-off expiry":   func(c *Claims) { c.Expiry = time.Unix(maxSeconds+1, 0) },
		"zero-time expiry": func(c *Claims) { c.Expiry = time.Unix(0, 0) },
	} {
		c := f.claims
		change(&c)
		if token, err := f.signer.Mint(c); !errors.Is(err, ErrClaims) || token != nil {
			t.Errorf("%s: %v, %v", name, token, err)
		}
	}
	for name, s := range map[string]*Signer{
		"no key":         NewSigner(nil, "broker"),
		"short key":      NewSigner(make([]byte, 5), "broker"),
		"no issuer":      NewSigner(testKey("broker"), ""),
		"URI for issuer": NewSigner(testKey("broker"), "https://broker"),
	} {
		c := f.claims
		c.Issuer = ""
		if _, err := s.Mint(c); !errors.Is(err, ErrClaims) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A part of a second is cut off, never rounded up: no token outlives its grant.
func TestTimesAreCutToSeconds(t *testing.T) {
	f := newFixture(t)
	f.claims.Expiry = f.now.Add(10*time.Second + 999*time.Millisecond)
	v, err := f.verify(f.mint(t))
	if err != nil {
		t.Fatal(err)
	}
	if want := f.now.Add(10 * time.Second); !v.Claims().Expiry.Equal(want) {
		t.Errorf("expiry is %s, want %s", v.Claims().Expiry, want)
	}
}

func TestTokensDoNotPrintThemselves(t *testing.T) {
	f := newFixture(t)
	token := f.mint(t)
	grant := f.claims.Grant.String()
	for _, verb := range []string{"%v", "%s", "%+v", "%#v", "%x", "%X", "%q", "%d"} {
		if got := fmt.Sprintf(verb, token); got != grant {
			t.Errorf("%s prints %q, want %q", verb, got, grant)
		}
		if got := fmt.Sprintf(verb, Token("\x01\x02")); got != "malformed" {
			t.Errorf("%s of rubbish prints %q", verb, got)
		}
	}
	var text, asJSON bytes.Buffer
	slog.New(slog.NewTextHandler(&text, nil)).LogAttrs(context.Background(), slog.LevelInfo, "m", slog.Any("token", token))
	slog.New(slog.NewJSONHandler(&asJSON, nil)).LogAttrs(context.Background(), slog.LevelInfo, "m", slog.Any("token", token))
	secret, err := token.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	for _, out := range []string{text.String(), asJSON.String()} {
		if !strings.Contains(out, grant) || strings.Contains(out, string(secret)) {
			t.Errorf("logged as %s", out)
		}
	}
	if got := Token(nil).String(); got != "malformed" {
		t.Errorf("no token prints %q", got)
	}
}

func TestTokenText(t *testing.T) {
	f := newFixture(t)
	token := f.mint(t)
	encoded, err := json.Marshal(token)
	if err != nil {
		t.Fatal(err)
	}
	var back Token
	if err := json.Unmarshal(encoded, &back); err != nil || !bytes.Equal(back, token) {
		t.Errorf("text does not round-trip: %v", err)
	}
	text := strings.Trim(string(encoded), `"`)
	for name, bad := range map[string]string{
		"padding":     text + "==",
		"line break":  text[:8] + "\n" + text[8:],
		"standard":    strings.ReplaceAll(strings.ReplaceAll(text, "-", "+"), "_", "/") + "+/",
		"spare bits":  "AB",
		"space":       " " + text,
		"much longer": strings.Repeat("A", 2*MaxToken),
	} {
		var got Token
		if err := got.UnmarshalText([]byte(bad)); !errors.Is(err, ErrTokenMalformed) || got != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVerifyCache(t *testing.T) {
	f := newFixture(t)
	cache := NewVerifyCache(f.kinds, f.verifier, 2)
	token := f.mint(t)
	first, err := cache.Verify(token, f.now)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := cache.Verify(token, f.now); err != nil || again != first {
		t.Errorf("the second time: %v", err)
	}
	if _, err := cache.Verify(token, f.claims.Expiry); !errors.Is(err, ErrTokenExpired) {
		t.Errorf("remembered and expired: %v", err)
	}
	// The Verifier's own check is made each time, whatever is remembered.
	cache.verifier = NewVerifier("broker", 8, publicOf(testKey("broker")))
	if _, err := cache.Verify(token, f.now); !errors.Is(err, ErrTokenEpoch) {
		t.Errorf("remembered and of another epoch: %v", err)
	}
	cache.verifier = f.verifier

	bad := bytes.Clone(token)
	bad[len(bad)-1] ^= 1
	if _, err := cache.Verify(bad, f.now); !errors.Is(err, ErrTokenSignature) || cache.Len() != 1 {
		t.Errorf("a forgery: %v, %d remembered", err, cache.Len())
	}
	for range 5 {
		f.claims.Grant = uuid.New()
		if _, err := cache.Verify(f.mint(t), f.now); err != nil {
			t.Fatal(err)
		}
	}
	if cache.Len() != 2 {
		t.Errorf("%d tokens remembered, want 2", cache.Len())
	}
	if NewVerifyCache(f.kinds, f.verifier, 0) == nil {
		t.Error("no cache")
	}
}

func TestConcurrentUse(t *testing.T) {
	f := newFixture(t)
	cache := NewVerifyCache(f.kinds, f.verifier, 3)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			c := f.claims
			for i := range 20 {
				c.Grant[15] = byte(i % 6)
				token, err := f.signer.Mint(c)
				if err != nil {
					t.Error(err)
					return
				}
				if v, err := cache.Verify(token, f.now); err != nil || v.Claims().Grant != c.Grant {
					t.Errorf("grant %s: %v", c.Grant, err)
				}
			}
		})
	}
	all.Wait()
}
