package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/failpoint"
)

// tombstone is a revocation that the ledger could not be told yet. A file in
// the runtime directory keeps it for a broker that is started meanwhile.
type tombstone struct {
	Actor  ledger.Actor `json:"actor"`
	Reason string       `json:"reason"`
}

func (b *Broker) tombstones() string { return filepath.Join(b.o.RuntimeDir, "tombstones") }

// cutUnrecorded takes grants back although that cannot be put on record, and
// says so. Access that somebody took back must not go on because a disk is full.
func (b *Broker) cutUnrecorded(actor ledger.Actor, pick func(*ledger.State) []uuid.UUID, reason string, cause error) error {
	var open, ending []ledger.Grant // the latter are on record already, and perhaps not cut yet
	b.ledger.View(func(s *ledger.State) {
		for _, root := range topmost(s, pick(s)) {
			switch g, ok := s.Grant(root); {
			case ok && !g.State.Ended():
				open = append(open, g)
			case ok && !g.State.Final():
				ending = append(ending, g)
			}
		}
	})
	if len(open) == 0 {
		return unrecorded("the revocation is not durable", cause)
	}
	b.log.Error("a revocation cannot be recorded; cutting access all the same", "grants", len(open), "err", cause)
	b.mu.Lock()
	for _, g := range open {
		b.unrecorded[g.ID] = tombstone{actor, reason}
	}
	b.mu.Unlock()
	failpoint.Hit("tombstone.before")
	noted := ""
	for _, g := range open {
		if err := writeTombstone(b.tombstones(), g.ID.String(), tombstone{actor, reason}); err != nil {
			noted = ", nor noted in the runtime directory, so that the broker must not be restarted before it is either"
			b.log.Error("a restart of the broker before the ledger can be written would bring a grant back", "grant", g.ID, "err", err)
		}
	}
	ctx, cancel := context.WithTimeout(b.ctx, b.o.stretched(5*b.o.CutDeadline+10*time.Second))
	defer cancel()
	done := "access was cut"
	if err := errors.Join(b.reconciler.CutNow(ctx, open), b.reconciler.AwaitCut(ctx, ending)); err != nil {
		done = "access is being cut, which has not ended yet"
	}
	what, remedy := ledger.Diagnose(cause)
	return api.Errorf(api.CodeUnavailable, "%s, but the revocation could not be recorded%s: the ledger cannot be written: %s. "+
		"It will be recorded as soon as it can: %s. Do not restart the host before, "+
		"and see that the grants are shown as revoked", done, noted, what, remedy).WithCause(cause)
}

// writeTombstone is durable when it returns.
func writeTombstone(in, name string, t any) error {
	if err := os.MkdirAll(in, 0o700); err != nil {
		return err
	}
	body, err := json.Marshal(t)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(in, name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	failpoint.Hit("tombstone.made")
	_, err = f.Write(body)
	err = errors.Join(err, f.Sync(), f.Close())
	failpoint.Hit("tombstone.written")
	dir, openErr := os.Open(in)
	if openErr != nil {
		return errors.Join(err, openErr)
	}
	return errors.Join(err, dir.Sync(), dir.Close())
}

// findTombstones takes over the revocations that the last broker could not
// record, and records them. What a file holds is not needed for that.
func (b *Broker) findTombstones(ctx context.Context) error {
	entries, err := os.ReadDir(b.tombstones())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cannot look for unrecorded revocations: %w", err)
	}
	b.mu.Lock()
	for _, e := range entries {
		grant, err := uuid.Parse(e.Name())
		if err != nil {
			b.log.Warn("not a grant's tombstone; left alone", "path", filepath.Join(b.tombstones(), e.Name()))
			continue
		}
		t := tombstone{Actor: brokerActor}
		body, err := os.ReadFile(filepath.Join(b.tombstones(), e.Name()))
		if err != nil || json.Unmarshal(body, &t) != nil {
			t = tombstone{Actor: brokerActor, Reason: "revoked while the ledger could not be written"}
		}
		b.unrecorded[grant] = t
	}
	b.mu.Unlock()
	return b.recordTombstones(ctx)
}

// recordTombstones puts on record what could not be before. The grants that
// derive from them end with them.
func (b *Broker) recordTombstones(ctx context.Context) error {
	b.mu.Lock()
	late := make(map[uuid.UUID]tombstone, len(b.unrecorded))
	for id, t := range b.unrecorded {
		late[id] = t
	}
	b.mu.Unlock()
	if len(late) == 0 || b.ledger.Poisoned() != nil {
		return nil // whoever mends the ledger says why it cannot be told
	}
	_, err := b.ledger.Update(ctx, func(tx *ledger.Tx) error {
		s := tx.State()
		for id, t := range late {
			if _, known := s.Grant(id); !known {
				continue
			}
			err := tx.Append(ledger.NewChange(ledger.GrantRevoking, t.Actor, id, ledger.Change{Reason: t.Reason}))
			if err != nil && !errors.Is(err, ledger.ErrIllegalMove) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("cannot record a revocation: %w", err)
	}
	failpoint.Hit("tombstone.recorded")
	for id := range late {
		if err := os.Remove(filepath.Join(b.tombstones(), id.String())); err != nil && !errors.Is(err, os.ErrNotExist) {
			b.log.Warn("cannot remove the tombstone of a revocation that is on record now", "grant", id, "err", err)
		}
		failpoint.Hit("tombstone.removed")
		b.mu.Lock()
		delete(b.unrecorded, id)
		b.mu.Unlock()
		b.reconciler.Unbar(id)
		if !b.ready.Load() {
			continue // no shim may be adopted yet; whoever settles wakes all VMs
		}
		b.wakeHeirs(id)
	}
	return nil
}
