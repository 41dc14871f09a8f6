package capabilities

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/uuid"
	"github.com/veraison/go-cose"
)

// Errors of tokens. Each refusal wraps exactly one.
var (
	// ErrTokenMalformed is returned by ParseToken for bytes that are not the
	// one encoding of a token.
	ErrTokenMalformed = errors.New("malformed token")
	// ErrTokenUnknownKey, ErrTokenSignature, ErrTokenKeyRevoked, ErrTokenIssuer,
	// ErrTokenEpoch and ErrTokenExpired are returned by Verify, checked in this
	// order, but for ErrTokenEpoch of a key of another epoch, which comes in the
	// place of ErrTokenKeyRevoked.
	ErrTokenUnknownKey = errors.New("token is signed with an unknown key")
	ErrTokenSignature  = errors.New("token has a wrong signature")
	ErrTokenKeyRevoked = errors.New("token is signed with a revoked key")
	ErrTokenIssuer     = errors.New("token is of another issuer")
	ErrTokenEpoch      = errors.New("token is of another epoch of the ledger")
	ErrTokenExpired    = errors.New("token has expired")
	// ErrTokenHolder is returned by Verified.For.
	ErrTokenHolder = errors.New("token belongs to another holder")
	// ErrClaims is returned by Mint for claims that no token can carry.
	ErrClaims = errors.New("cannot mint a token")
)

// MaxToken bounds a token in bytes: the longest path and room for the rest.
const MaxToken = 8 << 10

// Claims are what a token says. Times are whole seconds: Mint cuts off the
// rest, so that a token never lives longer than was decided.
type Claims struct {
	// Issuer names the broker; Mint fills it in.
	Issuer string
	// Holder is the VM that the token is of use to.
	Holder uuid.UUID
	// Grant is the row of the ledger behind the token.
	Grant uuid.UUID
	// Parent is the grant that this one derives from; zero for none.
	Parent uuid.UUID
	// IssuedAt is when the token was made.
	IssuedAt time.Time
	// Expiry is when it ends; zero for "until the holder's exit".
	Expiry time.Time
	// Epoch is the ledger's. A ledger restored from a backup has a new one.
	Epoch uint64
	// Capability is what the holder may do.
	Capability Capability
}

// Token is the encoding of a signed token. It is a secret of its holder, so
// whatever prints it as text prints the grant's id alone; only MarshalText
// gives the bytes away.
type Token []byte

// String is the id of the grant, or "malformed".
func (t Token) String() string {
	if id, ok := grantOf(t); ok {
		return id.String()
	}
	return "malformed"
}

// Format prints String for every verb, %x and %#v included.
func (t Token) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }

// LogValue is the id of the grant.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// MarshalText is base64url without padding, the form of the APIs.
func (t Token) MarshalText() ([]byte, error) {
	return base64.RawURLEncoding.AppendEncode(nil, t), nil
}

// UnmarshalText reads what MarshalText writes.
func (t *Token) UnmarshalText(text []byte) error {
	if len(text) > base64.RawURLEncoding.EncodedLen(MaxToken) {
		return fmt.Errorf("%w: longer than %d bytes", ErrTokenMalformed, MaxToken)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(string(text))
	// The decoder skips line breaks, which would give a token two texts.
	if err != nil || base64.RawURLEncoding.EncodedLen(len(b)) != len(text) {
		return fmt.Errorf("%w: not base64url without padding", ErrTokenMalformed)
	}
	*t = b
	return nil
}

// Signer mints tokens. Safe for concurrent use.
type Signer struct {
	issuer  string
	kid     []byte
	headers cose.Headers
	signer  cose.Signer
	err     error
}

// NewSigner makes a signer for one key of one issuer. A key or an issuer that
// is of no use shows at the first Mint.
func NewSigner(key ed25519.PrivateKey, issuer string) *Signer {
	s := &Signer{issuer: issuer}
	if len(key) != ed25519.PrivateKeySize {
		s.err = fmt.Errorf("%w: not an Ed25519 private key", ErrClaims)
		return s
	}
	s.kid = KeyID(key.Public().(ed25519.PublicKey))
	s.headers = tokenHeaders(s.kid)
	s.signer, s.err = cose.NewSigner(cose.AlgorithmEdDSA, key)
	if s.err == nil && !validIssuer(issuer) {
		s.err = fmt.Errorf("%w: issuer %s must be 1 to %d bytes of UTF-8 without \":\"",
			ErrClaims, excerpt(issuer), maxIssuer)
	}
	return s
}

// KeyID is the kid of the signer's key.
func (s *Signer) KeyID() []byte { return append([]byte(nil), s.kid...) }

// KeyID is the kid of a key: the first 8 bytes of the SHA-256 of the public
// key's 32.
func KeyID(key ed25519.PublicKey) []byte {
	sum := sha256.Sum256(key)
	return sum[:keyIDSize]
}

// Mint signs claims; an error wraps ErrClaims. The capability must come from its
// Kind: the signer knows no kinds, and what none would decode ParseToken
// refuses.
func (s *Signer) Mint(c Claims) (Token, error) {
	if s.err != nil {
		return nil, s.err
	}
	if c.Issuer == "" {
		c.Issuer = s.issuer
	}
	if c.Issuer != s.issuer {
		return nil, fmt.Errorf("%w: issuer %s is not the signer's", ErrClaims, excerpt(c.Issuer))
	}
	resource, ok := c.Capability.Resource.(cbor.Marshaler)
	if !ok {
		return nil, fmt.Errorf("%w: resource %T has no encoding", ErrClaims, c.Capability.Resource)
	}
	encoded, err := resource.MarshalCBOR()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClaims, err)
	}
	payload, err := encodeClaims(c, encoded)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClaims, err)
	}
	m := cose.Sign1Message{Headers: s.headers, Payload: payload}
	if err := m.Sign(nil, tokenAAD, s.signer); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClaims, err)
	}
	t, err := m.MarshalCBOR()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrClaims, err)
	}
	if len(t) > MaxToken {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrClaims, MaxToken)
	}
	return t, nil
}
