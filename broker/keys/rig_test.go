package keys

import (
	"context"
	"crypto/ed25519"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

var (
	testKinds = capabilities.NewKinds(capabilities.FS{})
	partition = uuid.MustParse("99999999-9999-4999-8999-999999999999")
	holder    = uuid.MustParse("aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa")
	someone   = ledger.Actor{Kind: ledger.ActorBroker}
)

// world is a state directory, and the broker's part of it while it is started.
type world struct {
	t      *testing.T
	dir    string
	id     uuid.UUID // of the ledger
	ledger *ledger.Ledger
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: filepath.Join(t.TempDir(), "state")}
	t.Cleanup(func() {
		w.stop()
		if !ledger.Exists(w.dir) {
			return
		}
		if r, err := ledger.Verify(context.Background(), w.dir); err != nil || r.Broken != nil {
			t.Errorf("the ledger is not whole after the test: %+v, %v", r.Broken, err)
		}
	})
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// start is what a broker does first.
func (w *world) start() *Ring {
	w.t.Helper()
	r, err := w.open()
	w.must(err)
	return r
}

func (w *world) open() (*Ring, error) {
	l, err := ledger.Open(context.Background(), ledger.Options{Dir: w.dir, Kinds: testKinds, Clock: clock.System{}})
	if err != nil {
		return nil, err
	}
	w.ledger = l
	l.View(func(s *ledger.State) { w.id = s.LedgerID() })
	return Open(context.Background(), l, w.dir, testKinds, slog.New(slog.DiscardHandler))
}

// tryStart is the error of a start.
func (w *world) tryStart() error {
	w.t.Helper()
	_, err := w.open()
	w.stop()
	return err
}

func (w *world) stop() {
	w.t.Helper()
	if w.ledger != nil {
		w.must(w.ledger.Close())
		w.ledger = nil
	}
}

func (w *world) offline() Offline { return Offline{Dir: w.dir, Clock: clock.System{}, Actor: someone} }

// files are the names in the state directory that stay when SQLite is done.
func (w *world) files() string {
	w.t.Helper()
	entries, err := os.ReadDir(w.dir)
	w.must(err)
	var names []string
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), "-wal") && !strings.HasSuffix(e.Name(), "-shm") {
			names = append(names, e.Name())
		}
	}
	return strings.Join(names, " ")
}

func (w *world) append(events ...ledger.Event) {
	w.t.Helper()
	_, err := w.ledger.Update(context.Background(), func(tx *ledger.Tx) error {
		for _, e := range events {
			if err := tx.Append(e); err != nil {
				return err
			}
		}
		return nil
	})
	w.must(err)
}

// grant is an active grant on a path.
func (w *world) grant(path string) ledger.Grant {
	w.t.Helper()
	c, err := testKinds.Parse("fs:ro:"+partition.String()+":"+path, nil)
	w.must(err)
	id := uuid.New()
	w.append(ledger.NewGrant(someone, id, holder, partition, ledger.GrantRecord{Capability: c, Persist: true}),
		ledger.NewChange(ledger.GrantActive, someone, id, ledger.Change{}))
	return w.look(id)
}

func (w *world) look(id uuid.UUID) (g ledger.Grant) {
	w.ledger.View(func(s *ledger.State) { g, _ = s.Grant(id) })
	return g
}

func (w *world) mint(r *Ring, g ledger.Grant) capabilities.Token {
	w.t.Helper()
	token, _, err := r.Mint(context.Background(), someone, capabilities.Claims{
		Holder: g.Holder, Grant: g.ID, IssuedAt: g.Created, Capability: g.Capability,
	})
	w.must(err)
	return token
}

func (w *world) rotate(r *Ring) {
	w.t.Helper()
	staged, err := r.Stage()
	w.must(err)
	_, err = w.ledger.Update(context.Background(), func(tx *ledger.Tx) error { return staged.Append(tx, someone) })
	w.must(err)
	w.must(staged.Done(err))
}

func (w *world) verify(r *Ring, token capabilities.Token) error {
	v, err := r.Verify(token, time.Now())
	if err == nil {
		w.ledger.View(func(s *ledger.State) { err = r.Refused(s, v) })
	}
	return err
}

func (w *world) keys() (out []ledger.Key) {
	w.ledger.View(func(s *ledger.State) { out = s.Keys() })
	return out
}

func public(k *file) ed25519.PublicKey { return k.private.Public().(ed25519.PublicKey) }
