package capabilities

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/uuid"
	"github.com/veraison/go-cose"
)

// A token is a COSE_Sign1_Tagged (RFC 9052 §4.2) in core deterministic CBOR
// (RFC 8949 §4.2.1):
//
//	18([ << {1: -8, 4: kid} >>, {}, << claims >>, signature ])
//
//	header  1   alg, EdDSA (-8)            RFC 9052 §3.1, RFC 9053 §2.2
//	header  4   kid, 8 bytes               RFC 9052 §3.1
//
// Both headers are protected and the unprotected map is empty, so that no byte
// of a token is outside the signature. The signature also covers the external
// AAD (RFC 9052 §4.4), which sets tokens apart from all else the key signs.
//
//	claim   1   iss    text, no ":"        RFC 8392 §3.1.1
//	claim   2   sub    text, holder's UUID RFC 8392 §3.1.2
//	claim   4   exp    int, absent: none   RFC 8392 §3.1.4
//	claim   6   iat    int                 RFC 8392 §3.1.6
//	claim   7   cti    16 bytes, grant     RFC 8392 §3.1.7
//	claim  -65537      16 bytes, parent grant; absent: none
//	claim  -65538      uint, epoch of the ledger
//	claim  -65539      map, the capability
//
// Keys below -65536 are for private use (RFC 8392 §9.1). The capability:
//
//	1  kind      text
//	2  resource  as the kind says; fs: {1: partition, 16 bytes; 2: path, text}
//	3  rights    array of text, sorted
//	4  provider  reserved: which net or USB VM serves it
//	5  except    reserved: what is taken out of the resource
//
// A reserved key is refused until a kind gives it a meaning: a reader that
// skipped an exclusion would grant what was excluded.
const (
	keyIDSize = 8
	maxIssuer = 255
	// maxSeconds is the end of the year 9999, past which times have no text.
	maxSeconds = 253402300799
)

var tokenAAD = []byte("spectrum-capability-token/v1")

type claimsWire struct {
	Issuer     string         `cbor:"1,keyasint"`
	Subject    string         `cbor:"2,keyasint"`
	Expiry     int64          `cbor:"4,keyasint,omitempty"`
	IssuedAt   int64          `cbor:"6,keyasint"`
	ID         []byte         `cbor:"7,keyasint"`
	Parent     []byte         `cbor:"-65537,keyasint,omitempty"`
	Epoch      uint64         `cbor:"-65538,keyasint"`
	Capability capabilityWire `cbor:"-65539,keyasint"`
}

type capabilityWire struct {
	Kind     string          `cbor:"1,keyasint"`
	Resource cbor.RawMessage `cbor:"2,keyasint"`
	Rights   []string        `cbor:"3,keyasint"`
	Provider cbor.RawMessage `cbor:"4,keyasint,omitempty"`
	Except   cbor.RawMessage `cbor:"5,keyasint,omitempty"`
}

// tokenHeaders are the only headers that a token of this key has.
func tokenHeaders(kid []byte) cose.Headers {
	return cose.Headers{
		RawProtected: protectedHeader(kid),
		Protected: cose.ProtectedHeader{
			cose.HeaderLabelAlgorithm: cose.AlgorithmEdDSA,
			cose.HeaderLabelKeyID:     kid,
		},
		RawUnprotected: emptyMap,
		Unprotected:    cose.UnprotectedHeader{},
	}
}

var emptyMap = []byte{0xa0}

// protectedHeader is << {1: -8, 4: kid} >> for a kid of 8 bytes, written out:
// a reader that compares with it needs no opinion about any other header.
func protectedHeader(kid []byte) []byte {
	return append([]byte{0x4d, 0xa2, 0x01, 0x27, 0x04, 0x48}, kid...)
}

// validIssuer: a StringOrURI with a ":" would have to be a URI.
func validIssuer(s string) bool {
	return s != "" && len(s) <= maxIssuer && utf8.ValidString(s) && !strings.Contains(s, ":")
}

// encodeClaims writes valid claims, with the resource already encoded, and
// refuses others.
func encodeClaims(c Claims, resource []byte) ([]byte, error) {
	w := claimsWire{
		Issuer:   c.Issuer,
		Subject:  c.Holder.String(),
		IssuedAt: c.IssuedAt.Unix(),
		ID:       c.Grant[:],
		Epoch:    c.Epoch,
		Capability: capabilityWire{
			Kind:     c.Capability.Kind,
			Resource: resource,
			Rights:   c.Capability.Rights,
		},
	}
	if !c.Expiry.IsZero() {
		w.Expiry = c.Expiry.Unix()
		if w.Expiry <= 0 {
			return nil, errors.New("expiry is out of range")
		}
	}
	if c.Parent != uuid.Nil {
		w.Parent = c.Parent[:]
	}
	if err := w.check(); err != nil {
		return nil, err
	}
	return encMode.Marshal(w)
}

// check holds for all that the types do not say, both ways.
func (w *claimsWire) check() error {
	switch {
	case !validIssuer(w.Issuer):
		return errors.New("issuer is empty, too long or a URI")
	case w.Subject == uuid.Nil.String():
		return errors.New("no holder")
	case bytes.Equal(w.ID, uuid.Nil[:]):
		return errors.New("no grant")
	case bytes.Equal(w.Parent, uuid.Nil[:]):
		return errors.New("parent is zero")
	case w.Parent != nil && bytes.Equal(w.Parent, w.ID):
		return errors.New("the grant is its own parent")
	case w.IssuedAt <= 0 || w.IssuedAt > maxSeconds:
		return errors.New("issue time is out of range")
	case w.Expiry < 0 || w.Expiry > maxSeconds:
		return errors.New("expiry is out of range")
	case w.Expiry != 0 && w.Expiry < w.IssuedAt:
		return errors.New("expires before it was issued")
	case w.Capability.Provider != nil:
		return errors.New("capability key 4 (provider) is reserved")
	case w.Capability.Except != nil:
		return errors.New("capability key 5 (except) is reserved")
	}
	return nil
}

// claims turns decoded claims into values.
func (w *claimsWire) claims(k *Kinds) (Claims, error) {
	if err := w.check(); err != nil {
		return Claims{}, err
	}
	c := Claims{Issuer: w.Issuer, Epoch: w.Epoch, IssuedAt: time.Unix(w.IssuedAt, 0).UTC()}
	var ok bool
	if c.Holder, ok = canonicalUUID(w.Subject); !ok {
		return Claims{}, errors.New("holder is not a UUID in its canonical form")
	}
	var err error
	if c.Grant, err = uuid.FromBytes(w.ID); err != nil {
		return Claims{}, errors.New("grant is not 16 bytes")
	}
	if w.Parent != nil {
		if c.Parent, err = uuid.FromBytes(w.Parent); err != nil {
			return Claims{}, errors.New("parent is not 16 bytes")
		}
	}
	if w.Expiry != 0 {
		c.Expiry = time.Unix(w.Expiry, 0).UTC()
	}
	kind, err := k.kind(w.Capability.Kind)
	if err != nil {
		return Claims{}, err
	}
	c.Capability, err = kind.DecodeCBOR(w.Capability.Resource, w.Capability.Rights)
	return c, err
}

// Parsed is a token whose form is right. Nothing is known yet of who made it:
// it cannot authorise.
type Parsed struct {
	message cose.Sign1Message
	kid     [keyIDSize]byte
	claims  Claims
}

// Grant is the id of the grant that the token claims, for the log and the
// audit.
func (p *Parsed) Grant() uuid.UUID { return p.claims.Grant }

// ParseToken reads the form of a token. It accepts only the bytes that Mint
// would have written for the same claims, key and signature.
func (k *Kinds) ParseToken(b []byte) (*Parsed, error) {
	p, err := k.parseToken(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTokenMalformed, err)
	}
	return p, nil
}

func (k *Kinds) parseToken(b []byte) (*Parsed, error) {
	p := &Parsed{}
	w, err := decodeToken(b, &p.message)
	if err != nil {
		return nil, err
	}
	kid, ok := p.message.Headers.Protected[cose.HeaderLabelKeyID].([]byte)
	if !ok || len(kid) != keyIDSize {
		return nil, fmt.Errorf("protected header has no kid of %d bytes", keyIDSize)
	}
	copy(p.kid[:], kid)
	if !bytes.Equal(p.message.Headers.RawProtected, protectedHeader(kid)) {
		return nil, errors.New("protected header is not exactly alg EdDSA and kid")
	}
	if !bytes.Equal(p.message.Headers.RawUnprotected, emptyMap) {
		return nil, errors.New("unprotected header is not the empty map")
	}
	if p.claims, err = w.claims(k); err != nil {
		return nil, err
	}
	if err := k.sameBytes(b, p); err != nil {
		return nil, err
	}
	return p, nil
}

// sameBytes writes the token again from its values alone, as Mint would.
func (k *Kinds) sameBytes(b []byte, p *Parsed) error {
	kind, err := k.kind(p.claims.Capability.Kind)
	if err != nil {
		return err
	}
	resource, err := kind.EncodeCBOR(p.claims.Capability.Resource)
	if err != nil {
		return err
	}
	payload, err := encodeClaims(p.claims, resource)
	if err != nil {
		return err
	}
	if !bytes.Equal(payload, p.message.Payload) {
		return errors.New("claims are not in their one encoding")
	}
	again := cose.Sign1Message{Headers: tokenHeaders(p.kid[:]), Payload: payload, Signature: p.message.Signature}
	whole, err := again.MarshalCBOR()
	if err != nil {
		return err
	}
	if !bytes.Equal(whole, b) {
		return errors.New("token is not in its one encoding")
	}
	return nil
}

// decodeToken reads the layers of a token and judges no value.
func decodeToken(b []byte, m *cose.Sign1Message) (*claimsWire, error) {
	if len(b) > MaxToken {
		return nil, fmt.Errorf("longer than %d bytes", MaxToken)
	}
	if err := m.UnmarshalCBOR(b); err != nil {
		return nil, err
	}
	if len(m.Signature) != 64 {
		return nil, errors.New("signature is not 64 bytes")
	}
	w := &claimsWire{}
	if err := decMode.Unmarshal(m.Payload, w); err != nil {
		return nil, err
	}
	return w, nil
}

// grantOf is what a token calls its grant, for printing.
func grantOf(t Token) (uuid.UUID, bool) {
	var m cose.Sign1Message
	w, err := decodeToken(t, &m)
	if err != nil {
		return uuid.Nil, false
	}
	id, err := uuid.FromBytes(w.ID)
	return id, err == nil
}
