package capabilities

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/uuid"
)

// Errors of spelling, decoding and narrowing a capability.
var (
	// ErrUnknownKind is returned where no kind of the given name is known.
	ErrUnknownKind = errors.New("unknown kind of capability")
	// ErrSpelling is returned by Parse for a text that is not a capability's
	// human spelling.
	ErrSpelling = errors.New("not a capability's spelling")
	// ErrEncoding is returned for JSON or CBOR that is not the strict encoding
	// of a capability.
	ErrEncoding = errors.New("not a capability's encoding")
	// ErrRights is returned for rights that the kind does not know, or that
	// are not in their canonical order.
	ErrRights = errors.New("not a set of rights of this kind")
	// ErrResource is returned for a resource that the kind cannot hold.
	ErrResource = errors.New("not a resource of this kind")
)

// MaxEncoded bounds the encodings that DecodeJSON and the spellings that Parse
// look at, in bytes. A path may need six bytes of JSON for each of its own.
const MaxEncoded = 32 << 10

// Resource is what a capability is about. Implementations are immutable
// values that encode themselves with encoding/json in the canonical form; one
// that also implements cbor.Marshaler (deterministic encoding) can be carried
// by a token.
type Resource interface {
	// Partition is the user partition that the resource belongs to; false
	// means that it is the host's.
	Partition() (uuid.UUID, bool)
	// String is the end of the human spelling, such as
	// "<partition-uuid>:/a/b".
	String() string
}

// speller is implemented by resources whose spelling shows the rights too.
type speller interface {
	// spell is all that follows "<kind>:" in the human spelling.
	spell(Rights) string
}

// Rights are names of rights, sorted and unique. The kind says which exist.
type Rights []string

// NewRights puts names into the canonical order.
func NewRights(names ...string) Rights {
	r := slices.Clone(names)
	slices.Sort(r)
	return slices.Compact(r)
}

// Has tells whether name is among the rights.
func (r Rights) Has(name string) bool { return slices.Contains(r, name) }

// Equal tells whether both hold the same rights.
func (r Rights) Equal(o Rights) bool { return slices.Equal(r, o) }

// SubsetOf tells whether o has every right of r.
func (r Rights) SubsetOf(o Rights) bool {
	for _, name := range r {
		if !o.Has(name) {
			return false
		}
	}
	return true
}

// Capability is what may be done: a value, never changed once made. Only a
// Kind's methods make valid ones.
type Capability struct {
	Kind     string
	Resource Resource
	Rights   Rights
}

// IsZero tells whether c is no capability at all.
func (c Capability) IsZero() bool {
	return c.Kind == "" && c.Resource == nil && len(c.Rights) == 0
}

// String is the canonical human spelling, with UUIDs for names:
// "fs:ro:<partition-uuid>:/a/b".
func (c Capability) String() string {
	if c.Resource == nil {
		return c.Kind + ":"
	}
	if s, ok := c.Resource.(speller); ok {
		return c.Kind + ":" + s.spell(c.Rights)
	}
	return c.Kind + ":" + c.Resource.String()
}

// Spoken is the human spelling with the petname of the resource's partition
// in place of its UUID, where name knows one ("" where it does not).
func (c Capability) Spoken(name func(partition uuid.UUID) string) string {
	s := c.String()
	if c.Resource == nil {
		return s
	}
	id, ok := c.Resource.Partition()
	if !ok {
		return s
	}
	petname := name(id)
	if petname == "" {
		return s
	}
	// The path comes last, so the first match is the partition's own place.
	return strings.Replace(s, id.String(), petname, 1)
}

// Equal tells whether both are the same capability. Spellings are canonical,
// so it compares those and asks nothing of the resource's type.
func (c Capability) Equal(o Capability) bool {
	return c.Kind == o.Kind && c.Rights.Equal(o.Rights) && c.String() == o.String()
}

// capabilityJSON fixes the names and the order of the fields.
type capabilityJSON struct {
	Kind     string   `json:"kind"`
	Resource Resource `json:"resource"`
	Rights   Rights   `json:"rights"`
}

// MarshalJSON writes the canonical encoding that Kinds.DecodeJSON reads:
// {"kind":"fs","resource":{…},"rights":["read"]}.
func (c Capability) MarshalJSON() ([]byte, error) {
	return json.Marshal(capabilityJSON(c))
}

// Narrowing is what a limit takes away from a capability.
type Narrowing struct {
	// ReadOnly leaves no right that changes the resource.
	ReadOnly bool
}

// Resolver turns a partition's name, as a person writes it, into its UUID.
type Resolver interface {
	Partition(name string) (uuid.UUID, error)
}

// Kind is one kind of capability. All methods are pure.
type Kind interface {
	// Name is the first word of the spelling and of the encodings.
	Name() string
	// Parse reads a whole human spelling, "<name>:…". A nil Resolver leaves
	// only UUIDs.
	Parse(spelling string, r Resolver) (Capability, error)
	// DecodeJSON and DecodeCBOR are strict and accept only canonical values.
	DecodeJSON(resource json.RawMessage, rights Rights) (Capability, error)
	DecodeCBOR(resource cbor.RawMessage, rights Rights) (Capability, error)
	// EncodeCBOR is the deterministic encoding that DecodeCBOR reads.
	EncodeCBOR(r Resource) ([]byte, error)
	// Covers tells whether parent allows all that child allows; false for
	// values that are not of this kind.
	Covers(parent, child Capability) bool
	// Overlaps tells whether there is something that both allow; false for values
	// that are not of this kind.
	Overlaps(a, b Capability) bool
	// Attenuate returns what of c is left after n.
	Attenuate(c Capability, n Narrowing) (Capability, error)
	// Use is what one use of a capability of this kind is, in words for people:
	// what a limit of uses counts. "" where nothing of it can be counted.
	Use() string
}

// Kinds is the set of kinds that a program knows. It is wired by hand and
// never changes.
type Kinds struct {
	byName map[string]Kind
}

// NewKinds makes a set. Two kinds of one name are a mistake in the wiring, for
// which it panics.
func NewKinds(kinds ...Kind) *Kinds {
	k := &Kinds{byName: make(map[string]Kind, len(kinds))}
	for _, kind := range kinds {
		name := kind.Name()
		if name == "" || strings.Contains(name, ":") {
			panic(fmt.Sprintf("capabilities: %q cannot name a kind", name))
		}
		if _, ok := k.byName[name]; ok {
			panic(fmt.Sprintf("capabilities: kind %q given twice", name))
		}
		k.byName[name] = kind
	}
	return k
}

// Names are the names of the kinds, sorted.
func (k *Kinds) Names() []string {
	names := make([]string, 0, len(k.byName))
	for name := range k.byName {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (k *Kinds) kind(name string) (Kind, error) {
	if kind, ok := k.byName[name]; ok {
		return kind, nil
	}
	return nil, fmt.Errorf("%w: %s (known: %s)", ErrUnknownKind, excerpt(name), strings.Join(k.Names(), ", "))
}

// Parse reads the human spelling of a capability of any known kind.
func (k *Kinds) Parse(spelling string, r Resolver) (Capability, error) {
	if len(spelling) > MaxEncoded {
		return Capability{}, fmt.Errorf("%w: longer than %d bytes", ErrSpelling, MaxEncoded)
	}
	name, _, ok := strings.Cut(spelling, ":")
	if !ok {
		return Capability{}, fmt.Errorf("%w: %s: has no \"<kind>:\"", ErrSpelling, excerpt(spelling))
	}
	kind, err := k.kind(name)
	if err != nil {
		return Capability{}, err
	}
	return kind.Parse(spelling, r)
}

// DecodeJSON reads what Capability.MarshalJSON writes. White space and the
// order of keys are free; all else is strict.
func (k *Kinds) DecodeJSON(data []byte) (Capability, error) {
	if len(data) > MaxEncoded {
		return Capability{}, fmt.Errorf("%w: longer than %d bytes", ErrEncoding, MaxEncoded)
	}
	fields, err := strictObject(data, "kind", "resource", "rights")
	if err != nil {
		return Capability{}, err
	}
	name, err := strictString(fields["kind"])
	if err != nil {
		return Capability{}, fmt.Errorf("kind: %w", err)
	}
	rights, err := strictStrings(fields["rights"])
	if err != nil {
		return Capability{}, fmt.Errorf("rights: %w", err)
	}
	kind, err := k.kind(name)
	if err != nil {
		return Capability{}, err
	}
	return kind.DecodeJSON(fields["resource"], rights)
}

// Covers tells whether parent allows all that child allows.
func (k *Kinds) Covers(parent, child Capability) bool {
	if parent.Kind != child.Kind {
		return false
	}
	kind, ok := k.byName[parent.Kind]
	return ok && kind.Covers(parent, child)
}

// Overlaps tells whether there is something that both allow: whoever has one
// reaches into the other.
func (k *Kinds) Overlaps(a, b Capability) bool {
	if a.Kind != b.Kind {
		return false
	}
	kind, ok := k.byName[a.Kind]
	return ok && kind.Overlaps(a, b)
}

// Attenuate returns what of c is left after n.
func (k *Kinds) Attenuate(c Capability, n Narrowing) (Capability, error) {
	kind, err := k.kind(c.Kind)
	if err != nil {
		return Capability{}, err
	}
	return kind.Attenuate(c, n)
}

// Use is what one use of a capability of that kind is, or "" where nothing of it
// can be counted.
func (k *Kinds) Use(name string) string {
	if kind, ok := k.byName[name]; ok {
		return kind.Use()
	}
	return ""
}

// excerpt quotes a stranger's text for a message, cut to a length that a
// person can read.
func excerpt(s string) string {
	const most = 80
	if len(s) <= most {
		return fmt.Sprintf("%q", s)
	}
	return fmt.Sprintf("%q…", s[:most])
}
