package keys

import (
	"context"
	"crypto/ed25519"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

// backup takes one beside the running broker.
func (w *world) backup() string {
	w.t.Helper()
	file := filepath.Join(w.t.TempDir(), "backup.db")
	_, err := ledger.Backup(context.Background(), w.dir, file)
	w.must(err)
	return file
}

// TestTokenOfAnEarlierEpoch: no token of before a restoration is accepted, and
// the reason is its epoch; nor is one that an old key signs for the new epoch.
func TestTokenOfAnEarlierEpoch(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	g := w.grant("/a")
	retired := w.mint(r, g)
	w.rotate(r)
	current := w.mint(r, g)
	stolen := r.signer
	backup := w.backup()
	w.rotate(r)
	unknown := w.mint(r, g) // its key is not in the backup
	w.stop()
	report, err := w.offline().Restore(t.Context(), backup)
	w.must(err)
	r = w.start()
	if r.kid != report.KID || len(w.keys()) != 3 {
		t.Errorf("key %s is in use of %d, want %s", r.kid, len(w.keys()), report.KID)
	}
	for name, token := range map[string]capabilities.Token{"the retired key's": retired, "the current key's": current} {
		if err := w.verify(r, token); !errors.Is(err, capabilities.ErrTokenEpoch) {
			t.Errorf("%s token: %v", name, err)
		}
	}
	if err := w.verify(r, unknown); !errors.Is(err, capabilities.ErrTokenUnknownKey) {
		t.Errorf("a token of a key that is not on record any more: %v", err)
	}
	fresh := w.grant("/b")
	forged, err := stolen.Mint(capabilities.Claims{Holder: fresh.Holder, Grant: fresh.ID, IssuedAt: fresh.Created, Capability: fresh.Capability, Epoch: 2})
	w.must(err)
	if err := w.verify(r, forged); !errors.Is(err, capabilities.ErrTokenEpoch) {
		t.Errorf("a token that the old key signs for the new epoch: %v", err)
	}
	if err := w.verify(r, w.mint(r, fresh)); err != nil {
		t.Errorf("the new key's token: %v", err)
	}
}

// TestRestoreInterrupted: the two steps that are the key's may fail, or the
// machine with them.
func TestRestoreInterrupted(t *testing.T) {
	trouble := errors.New("trouble")
	for name, c := range map[string]struct {
		spoil    func(o *ledger.RestoreOptions)
		restored bool
	}{
		"when the key is staged": {func(o *ledger.RestoreOptions) {
			stageKey := o.StageKey
			o.StageKey = func(m ledger.Mark) (ed25519.PublicKey, error) {
				_, err := stageKey(m)
				return nil, errors.Join(err, trouble)
			}
		}, false},
		"before the key is in place": {func(o *ledger.RestoreOptions) { o.KeepKey = func() error { return trouble } }, true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			r := w.start()
			was := r.kid
			g := w.grant("/a")
			token := w.mint(r, g)
			backup := w.backup()
			w.stop()
			o := w.offline().restoreOptions(backup, nil)
			c.spoil(&o)
			if _, err := ledger.Restore(t.Context(), o); !errors.Is(err, trouble) {
				t.Fatalf("got %v", err)
			}
			r = w.start()
			if (r.kid != was) != c.restored {
				t.Errorf("key %s is in use, before it was %s; restored: %v", r.kid, was, c.restored)
			}
			state, want := w.look(g.ID).State, ledger.Active
			err, wantErr := w.verify(r, token), error(nil)
			if c.restored {
				want, wantErr = ledger.Revoking, capabilities.ErrTokenEpoch
			}
			if state != want || !errors.Is(err, wantErr) {
				t.Errorf("the grant is %s, and its token: %v; want %s, %v", state, err, want, wantErr)
			}
			w.stop()
			if names := w.files(); strings.Contains(names, "next") || strings.Contains(names, "restoring") {
				t.Errorf("the state directory holds %s", names)
			}
		})
	}
}

// TestRestoreWithADamagedKey: whatever is wrong with it, it is being replaced;
// and where the anchor is gone, the key file knows the epoch.
func TestRestoreWithADamagedKey(t *testing.T) {
	for name, spoil := range map[string]func(w *world){
		"damaged":  func(w *world) { w.must(os.Truncate(w.path(fileName), 5)) },
		"a link":   func(w *world) { w.must(relink(w.path(fileName))) },
		"gone":     func(w *world) { w.must(os.Remove(w.path(fileName))) },
		"another":  func(w *world) { w.must(os.WriteFile(w.path(fileName), encode(newFile(uuid.New(), 1)), 0o600)) },
		"readable": func(w *world) { w.must(os.Chmod(w.path(fileName), 0o666)) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.start()
			backup := w.backup()
			w.stop()
			spoil(w)
			_, err := w.offline().Restore(t.Context(), backup)
			w.must(err)
			w.start()
			info, err := os.Lstat(w.path(fileName))
			if err != nil || info.Mode() != 0o600 {
				t.Errorf("the key is %v, %v", info, err)
			}
		})
	}
	w := newWorld(t)
	w.start()
	backup := w.backup()
	w.stop()
	for range 2 { // to epoch 3
		_, err := w.offline().Restore(t.Context(), backup)
		w.must(err)
	}
	for _, name := range []string{"ledger.anchor", "ledger.db"} {
		w.must(os.Remove(w.path(name)))
	}
	report, err := w.offline().Restore(t.Context(), backup)
	w.must(err)
	if report.Mark.Epoch != 4 {
		t.Errorf("the epoch is %d, want 4: beyond what the key file knows", report.Mark.Epoch)
	}
	other := newWorld(t)
	other.start()
	foreign := other.backup()
	w.must(os.Remove(w.path("ledger.anchor")))
	if _, err := w.offline().Restore(t.Context(), foreign); !errors.Is(err, ledger.ErrOtherLedger) {
		t.Errorf("of another ledger, by the key file: %v", err)
	}
	// Into an empty directory anything whole may go.
	empty := newWorld(t)
	_, err = empty.offline().Restore(t.Context(), foreign)
	w.must(err)
	r := empty.start()
	if err := empty.verify(r, empty.mint(r, empty.grant("/a"))); err != nil {
		t.Error(err)
	}
}
