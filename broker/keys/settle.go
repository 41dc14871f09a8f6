package keys

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/clock"
	"spectrum-os.org/broker/failpoint"
)

// Errors of Open, Rotate and Mint.
var (
	// ErrNotCurrent: the key file is not of the ledger's current key, or is of
	// no use.
	ErrNotCurrent = errors.New("the signing key is not the ledger's current one")
	// ErrForeign: the key file says that it is of another ledger or epoch.
	ErrForeign = errors.New("the signing key is another ledger's")
)

// settle brings the key file and the ledger together, and finishes or undoes
// what was cut short. What it returns is the current key.
func settle(ctx context.Context, l *ledger.Ledger, dir string) (*file, error) {
	var id uuid.UUID
	var epoch uint64
	var current ledger.Key
	var known, had bool
	l.View(func(s *ledger.State) {
		id, epoch = s.LedgerID(), s.Epoch()
		current, known = s.CurrentKey()
		had = len(s.Keys()) > 0
	})
	here, hereErr := readFile(filepath.Join(dir, fileName))
	next, nextErr := readFile(filepath.Join(dir, nextName))
	switch {
	case known && next != nil && next.kid() == current.KID:
		// The ledger has it, and the file did not follow.
		return next, promote(dir)
	case hereErr != nil:
		return nil, fmt.Errorf("%w. %s", hereErr, remedy(dir))
	case known && (here == nil || here.kid() != current.KID):
		found := "there is no key file"
		if here != nil {
			found = "it is key " + here.kid()
		}
		return nil, fmt.Errorf("%w: %s, and the ledger's is %s (%s). %s",
			ErrNotCurrent, found, current.KID, filepath.Join(dir, fileName), remedy(dir))
	case !known && had:
		return nil, fmt.Errorf("%w: the ledger has none since it was restored. %s", ErrNotCurrent, remedy(dir))
	}
	if next != nil || nextErr != nil {
		// It never signed anything.
		if err := unstage(dir); err != nil {
			return nil, err
		}
	}
	if known {
		return here, nil
	}
	return first(ctx, l, dir, here, id, epoch)
}

func remedy(dir string) string {
	return fmt.Sprintf("Put the right file back, or make a new key with the broker stopped: spectrum-cap keys rotate --state %s "+
		"(tokens of keys before it stay good until they end; revoke a key that somebody else may have)", dir)
}

// first gives a ledger without keys its first one: the key of the release
// before, which had no record of it, or a new one. A key file that names its
// ledger was written after the ledger was marked.
func first(ctx context.Context, l *ledger.Ledger, dir string, here *file, id uuid.UUID, epoch uint64) (*file, error) {
	switch {
	case here == nil:
	case here.ledger != uuid.Nil && (here.ledger != id || here.epoch != epoch):
		return nil, fmt.Errorf("%w: %s is of ledger %s in epoch %d, and what is there is ledger %s in epoch %d: the database was removed or swapped. "+
			"Put the right one back, restore a backup (spectrum-cap ledger restore --state %s FILE), or empty %s to begin with nothing",
			ErrForeign, filepath.Join(dir, fileName), here.ledger, here.epoch, id, epoch, dir, dir)
	case here.ledger != uuid.Nil && !l.Marked():
		return nil, fmt.Errorf("%w: %s says that the ledger was marked, and its anchor is gone: an older copy was put back. "+
			"Put the right one back, restore a backup (spectrum-cap ledger restore --state %s FILE), or empty %s to begin with nothing",
			ErrForeign, filepath.Join(dir, fileName), dir, dir)
	}
	if err := l.Mark(); err != nil {
		return nil, err
	}
	k := newFile(id, epoch)
	if here != nil {
		k.private = here.private
	}
	failpoint.Hit("key.marked")
	if err := stage(dir, k); err != nil {
		return nil, err
	}
	if here != nil {
		// The same key, in a file that names its ledger.
		if err := promote(dir); err != nil {
			return nil, err
		}
	}
	if err := record(ctx, l, k); err != nil {
		return nil, err
	}
	if here == nil {
		return k, promote(dir)
	}
	return k, nil
}

func record(ctx context.Context, l *ledger.Ledger, k *file) error {
	_, err := l.Update(ctx, func(tx *ledger.Tx) error {
		return tx.Append(ledger.NewKey(ledger.Actor{Kind: ledger.ActorBroker}, k.private.Public().(ed25519.PublicKey)))
	})
	if err != nil {
		return fmt.Errorf("cannot put the signing key on record: %w", err)
	}
	return nil
}

// Offline is what Rotate and Restore do without a broker.
type Offline struct {
	Dir   string // state directory
	Clock clock.Clock
	Actor ledger.Actor
}

// Rotate gives a ledger that no broker uses a new key, whatever became of the
// file of the present one, and returns its kid.
func (o Offline) Rotate(ctx context.Context) (string, error) {
	if !ledger.Exists(o.Dir) {
		return "", fmt.Errorf("there is no ledger in %s", o.Dir)
	}
	l, err := ledger.Open(ctx, ledger.Options{Dir: o.Dir, Clock: o.Clock})
	if err != nil {
		return "", err
	}
	kid, err := o.rotate(ctx, l)
	return kid, errors.Join(err, l.Close())
}

func (o Offline) rotate(ctx context.Context, l *ledger.Ledger) (string, error) {
	if err := l.Mark(); err != nil {
		return "", err
	}
	var k *file
	l.View(func(s *ledger.State) { k = newFile(s.LedgerID(), s.Epoch()) })
	if err := stage(o.Dir, k); err != nil {
		return "", err
	}
	if _, err := l.Update(ctx, func(tx *ledger.Tx) error {
		return tx.Append(ledger.NewKey(o.Actor, k.private.Public().(ed25519.PublicKey)))
	}); err != nil {
		return "", err
	}
	return k.kid(), promote(o.Dir)
}

// Restore puts a backup in the place of the ledger, with a new key.
func (o Offline) Restore(ctx context.Context, backup string) (ledger.RestoreReport, error) {
	// Whatever is wrong with the key, it is being replaced.
	here, _ := readFile(filepath.Join(o.Dir, fileName))
	return ledger.Restore(ctx, o.restoreOptions(backup, here))
}

func (o Offline) restoreOptions(backup string, here *file) ledger.RestoreOptions {
	return ledger.RestoreOptions{
		Dir: o.Dir, File: backup, Clock: o.Clock, Actor: o.Actor, Known: here.mark(),
		StageKey: func(m ledger.Mark) (ed25519.PublicKey, error) {
			k := newFile(m.Ledger, m.Epoch)
			return k.private.Public().(ed25519.PublicKey), stage(o.Dir, k)
		},
		KeepKey: func() error { return promote(o.Dir) },
	}
}
