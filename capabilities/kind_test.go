package capabilities

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/uuid"
)

// toyKind is a second kind, made with what any new kind has: the exported
// interfaces and one file.
type toyKind struct{}

type toyResource string

func (toyResource) Partition() (uuid.UUID, bool)   { return uuid.Nil, false }
func (r toyResource) String() string               { return string(r) }
func (r toyResource) MarshalCBOR() ([]byte, error) { return cbor.Marshal(string(r)) }

func newToy(name string) (Capability, error) {
	if name == "" {
		return Capability{}, fmt.Errorf("%w: no toy", ErrResource)
	}
	return Capability{Kind: "toy", Resource: toyResource(name), Rights: NewRights("play")}, nil
}

func (toyKind) Name() string { return "toy" }

func (toyKind) Parse(spelling string, _ Resolver) (Capability, error) {
	return newToy(spelling[len("toy:"):])
}

func (toyKind) DecodeJSON(resource json.RawMessage, _ Rights) (Capability, error) {
	s, err := strictString(resource)
	if err != nil {
		return Capability{}, err
	}
	return newToy(s)
}

func (toyKind) DecodeCBOR(resource cbor.RawMessage, _ Rights) (Capability, error) {
	var s string
	if err := cbor.Unmarshal(resource, &s); err != nil {
		return Capability{}, err
	}
	return newToy(s)
}

func (toyKind) EncodeCBOR(r Resource) ([]byte, error) { return r.(toyResource).MarshalCBOR() }

func (toyKind) Covers(parent, child Capability) bool { return parent.Equal(child) }

func (toyKind) Overlaps(a, b Capability) bool { return a.Equal(b) }

func (toyKind) Attenuate(c Capability, _ Narrowing) (Capability, error) { return c, nil }

func (toyKind) Use() string { return "" }

func TestAnotherKindNeedsNoEdit(t *testing.T) {
	kinds := NewKinds(FS{}, toyKind{})
	c, err := kinds.Parse("toy:ball", nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.String() != "toy:ball" || c.Spoken(func(uuid.UUID) string { return "x" }) != "toy:ball" {
		t.Errorf("is spelt %q", c)
	}
	encoded, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := kinds.DecodeJSON(encoded); err != nil || !got.Equal(c) {
		t.Errorf("%s decodes as %s, %v", encoded, got, err)
	}
	f := newFixture(t)
	claims := f.claims
	claims.Capability = c
	token, err := f.signer.Mint(claims)
	if err != nil {
		t.Fatal(err)
	}
	v, err := verifyFor(kinds, f.verifier, token, claims.Holder, f.now)
	if err != nil || !v.Claims().Capability.Equal(c) {
		t.Errorf("its token gives %v", err)
	}
	if _, err := NewKinds(FS{}).ParseToken(token); !errors.Is(err, ErrTokenMalformed) || !errors.Is(err, ErrUnknownKind) {
		t.Errorf("where the kind is unknown its token gives %v", err)
	}
}

func TestWiringMistakesPanic(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("two kinds of one name are accepted")
		}
	}()
	NewKinds(FS{}, FS{})
}

func TestUnknownKind(t *testing.T) {
	c := Capability{Kind: "no", Resource: toyResource("x"), Rights: NewRights("a")}
	if _, err := NewKinds(FS{}).Attenuate(c, Narrowing{}); !errors.Is(err, ErrUnknownKind) {
		t.Errorf("attenuating gives %v", err)
	}
}

func TestRights(t *testing.T) {
	r := NewRights("write", "read", "write")
	if !r.Equal(Rights{"read", "write"}) {
		t.Errorf("canonical rights are %q", r)
	}
	if !NewRights("read").SubsetOf(r) || r.SubsetOf(NewRights("read")) || !NewRights().SubsetOf(r) {
		t.Error("SubsetOf is wrong")
	}
}

// fixture is a broker's signer, what checks it, and claims that pass.
type fixture struct {
	kinds    *Kinds
	signer   *Signer
	verifier *Verifier
	claims   Claims
	now      time.Time
}
