package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

// keyTombstone is the revocation of a key that the ledger could not be told
// yet. Like that of a grant, a file in the runtime directory keeps it.
type keyTombstone struct {
	Actor  ledger.Actor `json:"actor"`
	Reason string       `json:"reason"`
}

func (b *Broker) keyTombstones() string { return filepath.Join(b.o.RuntimeDir, "revoked-keys") }

// barKey keeps a key refused until the ledger says that it is revoked.
func (b *Broker) barKey(kid string, t keyTombstone) {
	b.mu.Lock()
	b.barredKeys[kid] = t
	b.mu.Unlock()
	b.keys.Bar(kid)
	if err := writeTombstone(b.keyTombstones(), kid, t); err != nil {
		b.log.Error("a restart of the broker before the ledger can be written would accept a revoked key again", "kid", kid, "err", err)
	}
}

// findKeyTombstones takes over the revocations of keys that the last broker
// could not record, and records them.
func (b *Broker) findKeyTombstones(ctx context.Context) error {
	entries, err := os.ReadDir(b.keyTombstones())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot look for unrecorded revocations of keys: %w", err)
	}
	for _, e := range entries {
		if len(e.Name()) != 16 || !kidPattern.MatchString(e.Name()) {
			b.log.Warn("not a key's tombstone; left alone", "path", filepath.Join(b.keyTombstones(), e.Name()))
			continue
		}
		t := keyTombstone{Actor: brokerActor}
		body, err := os.ReadFile(filepath.Join(b.keyTombstones(), e.Name()))
		if err != nil || json.Unmarshal(body, &t) != nil {
			t = keyTombstone{Actor: brokerActor, Reason: "revoked while the ledger could not be written"}
		}
		b.mu.Lock()
		b.barredKeys[e.Name()] = t
		b.mu.Unlock()
		b.keys.Bar(e.Name())
	}
	return b.recordKeyTombstones(ctx)
}

// recordKeyTombstones puts on record what could not be before, with the grants
// that go with it.
func (b *Broker) recordKeyTombstones(ctx context.Context) error {
	b.mu.Lock()
	late := maps.Clone(b.barredKeys)
	b.mu.Unlock()
	if b.ledger.Poisoned() != nil {
		return nil // whoever mends the ledger says why it cannot be told
	}
	for kid, t := range late {
		staged, err := b.stageFor(kid)
		if err != nil {
			return fmt.Errorf("cannot make a key in the place of a revoked one: %w", err)
		}
		var roots []uuid.UUID
		_, err = b.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := appendKeyRevocation(tx, staged, t.Actor, kid, t.Reason); err != nil {
				return err
			}
			s := tx.State()
			roots = topmost(s, s.SignedBy(kid))
			for _, id := range roots {
				err := tx.Append(ledger.NewChange(ledger.GrantRevoking, t.Actor, id, ledger.Change{Reason: whyRevoked(kid, t.Reason)}))
				if err != nil && !errors.Is(err, ledger.ErrIllegalMove) {
					return err
				}
			}
			return nil
		})
		b.unstage(staged, err)
		if err != nil {
			return fmt.Errorf("cannot record the revocation of a key: %w", err)
		}
		if err := os.Remove(filepath.Join(b.keyTombstones(), kid)); err != nil && !errors.Is(err, os.ErrNotExist) {
			b.log.Warn("cannot remove the tombstone of a key whose revocation is on record now", "kid", kid, "err", err)
		}
		b.mu.Lock()
		delete(b.barredKeys, kid)
		b.mu.Unlock()
		b.keys.Unbar(kid)
		if b.ready.Load() {
			b.wakeHeirs(roots...)
		}
	}
	return nil
}
