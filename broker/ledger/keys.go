package ledger

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
)

// KeyCreatedData is the Data of key.created. The key signs from here on, and
// the one before is retired: what it signed stays good.
type KeyCreatedData struct {
	KID    string `json:"kid"`    // capabilities.KeyID of Public, in hexadecimal
	Public []byte `json:"public"` // Ed25519
}

// NewKey is the key.created event of a public key.
func NewKey(actor Actor, public ed25519.PublicKey) Event {
	return Event{Type: KeyCreated, Actor: actor, Data: mustJSON(KeyCreatedData{KID(public), public})}
}

// KeyRevokedData is the Data of key.revoked. Nothing that the key signed is
// good any more; the grants concerned are revoked by events of their own.
type KeyRevokedData struct {
	KID    string `json:"kid"`
	Reason string `json:"reason,omitempty"`
}

// IssuedData is the Data of token.issued; those of earlier releases have none.
type IssuedData struct {
	KID string `json:"kid,omitempty"` // of the key that signed the token
}

// KID is how events and people name a key.
func KID(public ed25519.PublicKey) string { return hex.EncodeToString(capabilities.KeyID(public)) }

// signingKey is what the events say of one key. It never changes.
type signingKey struct {
	kid    string
	public string // 32 bytes
	epoch  uint64
	// from is the event that made it current, or 0: it was so all the time
	// before. until is the one that retired it, or 0: it is current.
	from, until               uint64
	created, retired, revoked int64 // nanoseconds since 1970; 0: not yet
	reason                    string
}

// signedBy says that a key signed a token of a grant which was made when
// another key was current.
type signedBy struct {
	node int32
	kid  string
}

func (m *meta) key(kid string) int {
	return slices.IndexFunc(m.keys, func(k signingKey) bool { return k.kid == kid })
}

// changeKeys makes the list that f leaves of a copy the present one.
func (m *meta) changeKeys(seq uint64, f func(keys []signingKey) []signingKey) {
	m.keys, m.keysSeq = f(slices.Clone(m.keys)), seq
}

// retire ends the time of the current key, if there is one.
func retire(keys []signingKey, e *entry) []signingKey {
	for i := range keys {
		if keys[i].until == 0 {
			keys[i].until, keys[i].retired = e.Seq, e.Time.UnixNano()
		}
	}
	return keys
}

func (f *folder) keyCreated(l *layer, e *entry) error {
	d, err := read[KeyCreatedData](e)
	if err != nil {
		return err
	}
	if len(d.Public) != ed25519.PublicKeySize || KID(d.Public) != d.KID {
		return fmt.Errorf("%w: the public key of %s is not that of kid %q", ErrInvalidEvent, e.Type, d.KID)
	}
	if l.meta.key(d.KID) >= 0 {
		return fmt.Errorf("%w: key %s exists already", ErrIllegalMove, d.KID)
	}
	k := signingKey{kid: d.KID, public: string(d.Public), epoch: l.meta.epoch, from: e.Seq, created: e.Time.UnixNano()}
	if len(l.meta.keys) == 0 {
		// The release before had a key and no events of it.
		k.from = 0
	}
	l.meta.changeKeys(e.Seq, func(keys []signingKey) []signingKey { return append(retire(keys, e), k) })
	return nil
}

func (f *folder) keyRevoked(l *layer, e *entry) error {
	d, err := read[KeyRevokedData](e)
	if err != nil {
		return err
	}
	i := l.meta.key(d.KID)
	switch {
	case i < 0:
		return fmt.Errorf("%w: there is no key %q to revoke", ErrIllegalMove, d.KID)
	case l.meta.keys[i].revoked != 0:
		return fmt.Errorf("%w: key %s is revoked already", ErrIllegalMove, d.KID)
	case l.meta.keys[i].until == 0:
		return fmt.Errorf("%w: key %s is the current one: another must take its place first", ErrIllegalMove, d.KID)
	}
	l.meta.changeKeys(e.Seq, func(keys []signingKey) []signingKey {
		keys[i].revoked, keys[i].reason = e.Time.UnixNano(), d.Reason
		return keys
	})
	return nil
}

func (f *folder) issued(l *layer, e *entry) error {
	d, err := read[IssuedData](e)
	if err != nil || d.KID == "" {
		return err
	}
	k := l.meta.key(d.KID)
	if k < 0 {
		return fmt.Errorf("%w: a token signed by key %q, which does not exist", ErrIllegalMove, d.KID)
	}
	if i, ok := l.find(e.Grant); ok && !l.meta.keys[k].made(l.get(i)) {
		setKey(&l.signed, signedBy{i, f.in.string([]byte(d.KID))}, struct{}{})
	}
	return nil
}

// made tells whether the grant was made while the key was current.
func (k *signingKey) made(n *node) bool {
	return n.seq > k.from && (k.until == 0 || n.seq < k.until)
}

func (l *layer) signedBy(k *signingKey, i int32) bool {
	if k.made(l.get(i)) {
		return true
	}
	for at := l; at != nil; at = at.below {
		if _, ok := at.signed[signedBy{i, k.kid}]; ok {
			return true
		}
	}
	return false
}

// Key is what the ledger knows about one signing key. Its private half is not
// in the ledger.
type Key struct {
	KID              string
	Public           ed25519.PublicKey
	Epoch            uint64
	Current          bool
	Created          time.Time
	Retired, Revoked time.Time // zero: not yet
	Reason           string    // of its revocation
}

func (k *signingKey) key() Key {
	out := Key{
		KID: k.kid, Public: bytes.Clone([]byte(k.public)), Epoch: k.epoch, Current: k.until == 0,
		Created: nanoTime(k.created), Reason: k.reason,
	}
	if k.retired != 0 {
		out.Retired = nanoTime(k.retired)
	}
	if k.revoked != 0 {
		out.Revoked = nanoTime(k.revoked)
	}
	return out
}

// Keys are all keys there ever were, oldest first.
func (s *State) Keys() []Key {
	out := make([]Key, 0, len(s.l.meta.keys))
	for i := range s.l.meta.keys {
		out = append(out, s.l.meta.keys[i].key())
	}
	return out
}

// Key is the key with that id.
func (s *State) Key(kid string) (Key, bool) {
	i := s.l.meta.key(kid)
	if i < 0 {
		return Key{}, false
	}
	return s.l.meta.keys[i].key(), true
}

// CurrentKey is the key that signs. There is none before the first, and none
// between a restoration and the key that comes with it.
func (s *State) CurrentKey() (Key, bool) {
	if n := len(s.l.meta.keys); n > 0 && s.l.meta.keys[n-1].until == 0 {
		return s.l.meta.keys[n-1].key(), true
	}
	return Key{}, false
}

// KeysSeq is the last event that changed what the keys are worth: while it
// stays the same, so do they, and the epoch.
func (s *State) KeysSeq() uint64 { return s.l.meta.keysSeq }

// Signs tells whether the record has it that this key signs for this grant:
// the grant was made while the key was current, or a token.issued says so.
func (s *State) Signs(kid string, grant uuid.UUID) bool {
	k := s.l.meta.key(kid)
	i, ok := s.l.find(grant)
	return k >= 0 && ok && s.l.signedBy(&s.l.meta.keys[k], i)
}

// SignedBy are the grants that have not ended and that this key signs for.
func (s *State) SignedBy(kid string) []uuid.UUID {
	k := s.l.meta.key(kid)
	if k < 0 {
		return nil
	}
	var out []uuid.UUID
	for _, i := range s.l.open(uuid.Nil) {
		if n := s.l.get(i); !n.stateName().Ended() && s.l.signedBy(&s.l.meta.keys[k], i) {
			out = append(out, n.id)
		}
	}
	return out
}

// SignedCounts is for how many such grants each key signs. It looks at each grant
// once, however many keys there are: commits wait for who looks.
func (s *State) SignedCounts() map[string]int {
	out := map[string]int{}
	keys := s.l.meta.keys
	s.l.eachOpen(uuid.Nil, func(_ int32, n *node) bool {
		if k := slices.IndexFunc(keys, func(k signingKey) bool { return k.made(n) }); k >= 0 && !n.stateName().Ended() {
			out[keys[k].kid]++
		}
		return true
	})
	also := map[signedBy]struct{}{}
	for at := s.l; at != nil; at = at.below {
		maps.Copy(also, at.signed)
	}
	for by := range also {
		k := s.l.meta.key(by.kid)
		if n := s.l.get(by.node); k >= 0 && !keys[k].made(n) && !n.stateName().Ended() {
			out[by.kid]++
		}
	}
	return out
}
