package keys

import (
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

// remembered is how many verified tokens are not verified again.
const remembered = 4096

// Ring signs with the current key and verifies with all that the ledger knows.
// It is safe for concurrent use.
type Ring struct {
	ledger *ledger.Ledger
	dir    string
	kinds  *capabilities.Kinds
	log    *slog.Logger

	// mu is held shared to sign, and alone to change the key.
	mu     sync.RWMutex
	kid    string
	signer *capabilities.Signer

	barMu  sync.Mutex
	barred map[string]bool
	bars   uint64 // rises with each change of barred

	verifier atomic.Pointer[verifier]
}

// verifier is what the keys are worth as of one event.
type verifier struct {
	seq, bars uint64
	ledger    uuid.UUID
	cache     *capabilities.VerifyCache
}

// Open brings the key file in dir and the ledger together, and makes a key where
// there is none.
func Open(ctx context.Context, l *ledger.Ledger, dir string, kinds *capabilities.Kinds, log *slog.Logger) (*Ring, error) {
	r := &Ring{ledger: l, dir: dir, kinds: kinds, log: log, barred: map[string]bool{}}
	return r, r.settle(ctx)
}

// settle is called with mu held, or by Open.
func (r *Ring) settle(ctx context.Context) error {
	k, err := settle(ctx, r.ledger, r.dir)
	if err != nil {
		r.signer, r.kid = nil, ""
		return err
	}
	r.use(k)
	return nil
}

func (r *Ring) use(k *file) {
	r.signer, r.kid = capabilities.NewSigner(k.private, k.ledger.String()), k.kid()
}

// Mint signs the token of a grant, and returns the kid of the key that did.
// Where the key was not current yet when the grant was made, that it signs for
// it is put on record first, for actor.
func (r *Ring) Mint(ctx context.Context, actor ledger.Actor, c capabilities.Claims) (capabilities.Token, string, error) {
	r.mu.RLock()
	if kid, ok := r.current(); !ok {
		r.mu.RUnlock()
		if err := r.again(ctx, kid); err != nil {
			return nil, "", err
		}
		r.mu.RLock()
	}
	defer r.mu.RUnlock()
	kid, ok := r.current()
	if !ok {
		return nil, "", fmt.Errorf("%w: the key in use is %q, and the ledger's %q", ErrNotCurrent, r.kid, kid)
	}
	if r.isBarred(r.kid) {
		return nil, "", fmt.Errorf("%w: key %s was revoked, and the ledger could not be told", ErrNotCurrent, r.kid)
	}
	known := false
	r.ledger.View(func(s *ledger.State) { c.Epoch, known = s.Epoch(), s.Signs(r.kid, c.Grant) })
	if !known {
		_, err := r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			return tx.Append(ledger.Event{Type: ledger.TokenIssued, Actor: actor, Grant: c.Grant, Data: ledger.JSON(ledger.IssuedData{KID: r.kid})})
		})
		if err != nil {
			return nil, "", fmt.Errorf("cannot put on record which key signs for grant %s: %w", c.Grant, err)
		}
	}
	token, err := r.signer.Mint(c)
	return token, r.kid, err
}

// current is the ledger's current key, and whether it is the one in use.
func (r *Ring) current() (kid string, ok bool) {
	r.ledger.View(func(s *ledger.State) {
		k, _ := s.CurrentKey()
		kid = k.KID
	})
	return kid, r.signer != nil && kid == r.kid
}

// again settles after a change whose outcome was not known when it was made.
func (r *Ring) again(ctx context.Context, kid string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.current(); ok {
		return nil
	}
	r.log.Warn("the signing key is not the ledger's; settling", "in_use", r.kid, "ledger", kid)
	return r.settle(ctx)
}

// Verify accepts a token that a key of this ledger signed in this epoch and
// that has not expired. That the key was not revoked meanwhile is for the
// caller to see, where it looks whether the grant lives: with Refused.
func (r *Ring) Verify(token []byte, now time.Time) (*capabilities.Verified, error) {
	return r.check().Verify(token, now)
}

// Refused is why a token that was found good is not any more.
func (r *Ring) Refused(s *ledger.State, v *capabilities.Verified) error {
	kid := hex.EncodeToString(v.KeyID())
	k, ok := s.Key(kid)
	switch {
	case !ok:
		return fmt.Errorf("%w: kid %s", capabilities.ErrTokenUnknownKey, kid)
	case !k.Revoked.IsZero() || r.isBarred(kid):
		return fmt.Errorf("%w: kid %s", capabilities.ErrTokenKeyRevoked, kid)
	case v.Claims().Epoch != s.Epoch() || k.Epoch != s.Epoch():
		return fmt.Errorf("%w: %d, now is %d", capabilities.ErrTokenEpoch, v.Claims().Epoch, s.Epoch())
	}
	return nil
}

// check is the present verifier. What it remembers is forgotten with it, when
// what the keys are worth changes.
func (r *Ring) check() *capabilities.VerifyCache {
	r.barMu.Lock()
	bars := r.bars
	r.barMu.Unlock()
	now := r.verifier.Load()
	var seq, epoch uint64
	var id uuid.UUID
	var keys []ledger.Key
	r.ledger.View(func(s *ledger.State) {
		seq, id, epoch = s.KeysSeq(), s.LedgerID(), s.Epoch()
		if now == nil || now.seq != seq || now.ledger != id || now.bars != bars {
			keys = s.Keys()
		}
	})
	if now != nil && now.seq == seq && now.ledger == id && now.bars == bars {
		return now.cache
	}
	known := make([]capabilities.KnownKey, len(keys))
	for i, k := range keys {
		known[i].Public = k.Public
		switch {
		case !k.Revoked.IsZero() || r.isBarred(k.KID):
			known[i].Refused = capabilities.ErrTokenKeyRevoked
		case k.Epoch != epoch:
			known[i].Refused = capabilities.ErrTokenEpoch
		}
	}
	v := capabilities.NewVerifierOf(id.String(), epoch, known)
	next := &verifier{seq: seq, bars: bars, ledger: id, cache: capabilities.NewVerifyCache(r.kinds, v, remembered)}
	r.verifier.Store(next)
	return next.cache
}

// Bar refuses everything that a key signed although the ledger does not know
// that it is revoked; Unbar ends that, when it does.
func (r *Ring) Bar(kid string) { r.setBar(kid, true) }

// Unbar undoes Bar.
func (r *Ring) Unbar(kid string) { r.setBar(kid, false) }

func (r *Ring) setBar(kid string, on bool) {
	r.barMu.Lock()
	defer r.barMu.Unlock()
	if on {
		r.barred[kid] = true
	} else {
		delete(r.barred, kid)
	}
	r.bars++
}

func (r *Ring) isBarred(kid string) bool {
	r.barMu.Lock()
	defer r.barMu.Unlock()
	return r.barred[kid]
}

// Staged is a new key that is durable and not in use. Until Done nothing is
// signed.
type Staged struct {
	ring *Ring
	key  *file
}

// Stage makes a new key. Whoever gets one calls Done. It fails while the ledger is
// poisoned.
func (r *Ring) Stage() (*Staged, error) {
	r.mu.Lock()
	k, err := r.stage()
	if err != nil {
		r.mu.Unlock()
		return nil, err
	}
	return &Staged{r, k}, nil
}

// stage never puts a key in the place of one that is staged and that the ledger
// has, or may turn out to have: that is the only copy of it.
func (r *Ring) stage() (*file, error) {
	if err := r.ledger.Poisoned(); err != nil {
		return nil, fmt.Errorf("cannot make a signing key: %w: %w", ledger.ErrPoisoned, err)
	}
	kid, _ := r.current()
	if next, err := readFile(filepath.Join(r.dir, nextName)); err == nil && next != nil && next.kid() == kid {
		if err := promote(r.dir); err != nil {
			return nil, err
		}
		r.use(next)
	}
	var k *file
	r.ledger.View(func(s *ledger.State) { k = newFile(s.LedgerID(), s.Epoch()) })
	return k, stage(r.dir, k)
}

// KID names the new key.
func (s *Staged) KID() string { return s.key.kid() }

// Append makes the new key current, and retires the one before.
func (s *Staged) Append(tx *ledger.Tx, actor ledger.Actor) error {
	return tx.Append(ledger.NewKey(actor, s.key.private.Public().(ed25519.PublicKey)))
}

// Done puts the new key to use where the Update that appended it succeeded, and
// takes it away where it is known to have failed. Where that is not known, what
// is on the disk decides, when it was read again.
func (s *Staged) Done(err error) error {
	r := s.ring
	defer r.mu.Unlock()
	switch {
	case err == nil:
		r.use(s.key)
		if err := promote(r.dir); err != nil {
			return fmt.Errorf("%w; the key is in use, and a restart of the broker finishes this", err)
		}
		return nil
	case errors.Is(err, ledger.ErrUnknownOutcome):
		return nil
	}
	return unstage(r.dir)
}
