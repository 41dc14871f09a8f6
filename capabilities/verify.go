package capabilities

import (
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/veraison/go-cose"
)

// Verifier checks tokens of one issuer and epoch. It never changes, so it is
// safe for concurrent use; a new epoch or key is a new Verifier.
type Verifier struct {
	issuer string
	epoch  uint64
	keys   map[[keyIDSize]byte]knownKey
}

type knownKey struct {
	verifier cose.Verifier
	refused  error
}

// KnownKey is a public key and what its signature is worth.
type KnownKey struct {
	Public ed25519.PublicKey
	// Refused is why no token of this key is accepted any more, whatever the
	// token says: ErrTokenKeyRevoked, or ErrTokenEpoch for a key of an earlier
	// epoch, which could otherwise sign for the present one. nil: it is accepted.
	Refused error
}

// NewVerifier takes every key that may still have signed a live token. A key
// that is not an Ed25519 public key verifies nothing.
func NewVerifier(issuer string, epoch uint64, keys ...ed25519.PublicKey) *Verifier {
	known := make([]KnownKey, len(keys))
	for i, key := range keys {
		known[i].Public = key
	}
	return NewVerifierOf(issuer, epoch, known)
}

// NewVerifierOf is NewVerifier with keys that are refused for a reason of
// their own, so that their tokens are not called a stranger's.
func NewVerifierOf(issuer string, epoch uint64, keys []KnownKey) *Verifier {
	v := &Verifier{issuer: issuer, epoch: epoch, keys: make(map[[keyIDSize]byte]knownKey, len(keys))}
	for _, key := range keys {
		if len(key.Public) != ed25519.PublicKeySize {
			continue
		}
		if verifier, err := cose.NewVerifier(cose.AlgorithmEdDSA, key.Public); err == nil {
			v.keys[[keyIDSize]byte(KeyID(key.Public))] = knownKey{verifier, key.Refused}
		}
	}
	return v
}

// Verified is a token that this issuer made and that had not expired when it
// was looked at. Whether its grant is still live only the ledger knows.
type Verified struct {
	claims Claims
	kid    [keyIDSize]byte
}

// Verify checks the key, the signature, whether the key is still accepted, the
// issuer, the epoch and the expiry, in this order.
func (v *Verifier) Verify(p *Parsed, now time.Time) (*Verified, error) {
	if p == nil || p.message.Payload == nil {
		return nil, fmt.Errorf("%w: nothing was parsed", ErrTokenMalformed)
	}
	key, ok := v.keys[p.kid]
	if !ok {
		return nil, fmt.Errorf("%w: kid %x", ErrTokenUnknownKey, p.kid)
	}
	if err := p.message.Verify(tokenAAD, key.verifier); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTokenSignature, err)
	}
	if key.refused != nil {
		return nil, fmt.Errorf("%w: kid %x", key.refused, p.kid)
	}
	if err := v.check(p.claims, now); err != nil {
		return nil, err
	}
	return &Verified{claims: p.claims, kid: p.kid}, nil
}

// check is what of Verify depends on more than the token's bytes and the key.
func (v *Verifier) check(c Claims, now time.Time) error {
	if c.Issuer != v.issuer {
		return fmt.Errorf("%w: %s", ErrTokenIssuer, excerpt(c.Issuer))
	}
	if c.Epoch != v.epoch {
		return fmt.Errorf("%w: %d, now is %d", ErrTokenEpoch, c.Epoch, v.epoch)
	}
	if !c.Expiry.IsZero() && !now.Before(c.Expiry) {
		return fmt.Errorf("%w: at %s", ErrTokenExpired, c.Expiry.Format(time.RFC3339))
	}
	return nil
}

// Claims are what the token says.
func (v *Verified) Claims() Claims { return v.claims }

// KeyID is the kid of the key that signed it.
func (v *Verified) KeyID() []byte { return append([]byte(nil), v.kid[:]...) }

// For tells whether the token is of use to this VM, which the caller knows by
// the socket that it spoke through and never by what it said.
func (v *Verified) For(holder uuid.UUID) error {
	if holder == uuid.Nil || v.claims.Holder != holder {
		return fmt.Errorf("%w: grant %s", ErrTokenHolder, v.claims.Grant)
	}
	return nil
}

// VerifyCache remembers which bytes one Verifier found to be good, so that a
// token presented again costs a hash and not a signature. Refusals are not
// remembered: a stranger could fill it with them. Safe for concurrent use.
type VerifyCache struct {
	kinds    *Kinds
	verifier *Verifier

	mu     sync.Mutex
	tokens map[[sha256.Size]byte]*Verified
	order  [][sha256.Size]byte // a ring: the oldest is replaced
	next   int
}

// NewVerifyCache remembers at most size tokens (at least one).
func NewVerifyCache(kinds *Kinds, verifier *Verifier, size int) *VerifyCache {
	return &VerifyCache{
		kinds:    kinds,
		verifier: verifier,
		tokens:   make(map[[sha256.Size]byte]*Verified),
		order:    make([][sha256.Size]byte, max(size, 1)),
	}
}

// Verify is ParseToken and Verifier.Verify. Issuer, epoch and expiry are
// checked every time.
func (c *VerifyCache) Verify(b []byte, now time.Time) (*Verified, error) {
	if len(b) > MaxToken {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrTokenMalformed, MaxToken)
	}
	sum := sha256.Sum256(b)
	c.mu.Lock()
	found := c.tokens[sum]
	c.mu.Unlock()
	if found != nil {
		if err := c.verifier.check(found.claims, now); err != nil {
			return nil, err
		}
		return found, nil
	}
	p, err := c.kinds.ParseToken(b)
	if err != nil {
		return nil, err
	}
	v, err := c.verifier.Verify(p, now)
	if err != nil {
		return nil, err
	}
	c.remember(sum, v)
	return v, nil
}

func (c *VerifyCache) remember(sum [sha256.Size]byte, v *Verified) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.tokens[sum]; ok {
		return // another goroutine was first
	}
	delete(c.tokens, c.order[c.next])
	c.order[c.next] = sum
	c.next = (c.next + 1) % len(c.order)
	c.tokens[sum] = v
}

// Len is how many tokens are remembered.
func (c *VerifyCache) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.tokens)
}
