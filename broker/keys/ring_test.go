package keys

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

func (w *world) revokeKey(kid string) {
	w.t.Helper()
	w.append(ledger.Event{Type: ledger.KeyRevoked, Actor: someone, Data: ledger.JSON(ledger.KeyRevokedData{KID: kid, Reason: "stolen"})})
}

// TestRotation: what a retired key signed stays good, also across a restart;
// what a revoked one signed is refused at once, also where it is remembered.
func TestRotation(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	g := w.grant("/a")
	old := w.mint(r, g)
	first := r.kid
	w.rotate(r)
	fresh := w.mint(r, g)
	if r.kid == first || slices.Equal(old, fresh) {
		t.Fatal("the same key signs after a rotation")
	}
	for _, token := range []capabilities.Token{old, fresh} {
		if err := w.verify(r, token); err != nil {
			t.Errorf("after a rotation: %v", err)
		}
	}
	w.ledger.View(func(s *ledger.State) {
		if !s.Signs(first, g.ID) || !s.Signs(r.kid, g.ID) {
			t.Error("the record does not name both keys that signed for the grant")
		}
	})
	w.stop()
	r = w.start()
	if err := w.verify(r, old); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	w.revokeKey(first)
	if err := w.verify(r, old); !errors.Is(err, capabilities.ErrTokenKeyRevoked) {
		t.Errorf("of a revoked key, and remembered: %v", err)
	}
	if err := w.verify(r, fresh); err != nil {
		t.Errorf("of the current key: %v", err)
	}
	w.stop()
	r = w.start()
	if err := w.verify(r, old); !errors.Is(err, capabilities.ErrTokenKeyRevoked) {
		t.Errorf("of a revoked key, after a restart: %v", err)
	}
}

// TestRevokedBetweenTheLooks: a token was found good, and then its key is
// revoked, before it was looked whether its grant lives.
func TestRevokedBetweenTheLooks(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	token := w.mint(r, w.grant("/a"))
	first := r.kid
	w.rotate(r)
	found, err := r.Verify(token, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	refused := func() (err error) {
		w.ledger.View(func(s *ledger.State) { err = r.Refused(s, found) })
		return err
	}
	if err := refused(); err != nil {
		t.Errorf("not revoked yet: %v", err)
	}
	r.Bar(first)
	if err := refused(); !errors.Is(err, capabilities.ErrTokenKeyRevoked) {
		t.Errorf("barred: %v", err)
	}
	if _, err := r.Verify(token, time.Now()); !errors.Is(err, capabilities.ErrTokenKeyRevoked) {
		t.Errorf("barred, looked at anew: %v", err)
	}
	r.Unbar(first)
	if err := w.verify(r, token); err != nil {
		t.Errorf("not barred any more: %v", err)
	}
	w.revokeKey(first)
	if err := refused(); !errors.Is(err, capabilities.ErrTokenKeyRevoked) {
		t.Errorf("revoked: %v", err)
	}
}

// TestBarredKeySignsNothing while the ledger cannot be told.
func TestBarredKeySignsNothing(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	g := w.grant("/a")
	r.Bar(r.kid)
	_, _, err := r.Mint(t.Context(), someone, capabilities.Claims{Holder: g.Holder, Grant: g.ID, IssuedAt: g.Created, Capability: g.Capability})
	if !errors.Is(err, ErrNotCurrent) || !strings.Contains(err.Error(), "was revoked") {
		t.Errorf("got %v", err)
	}
}

// TestMintingWhileRotating: whatever key signed a token, the record says that it
// signs for the grant, so that revoking it ends the grant.
func TestMintingWhileRotating(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	var mu sync.Mutex
	signed := map[uuid.UUID]string{}
	done := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				g := w.grant("/a")
				token, kid, err := r.Mint(context.Background(), someone, capabilities.Claims{Holder: g.Holder, Grant: g.ID, IssuedAt: g.Created, Capability: g.Capability})
				if err != nil {
					t.Error(err)
					return
				}
				if err := w.verify(r, token); err != nil {
					t.Errorf("a token that was just signed: %v", err)
				}
				mu.Lock()
				signed[g.ID] = kid
				mu.Unlock()
			}
		})
	}
	for range 20 {
		w.rotate(r)
	}
	close(done)
	wg.Wait()
	w.stop()
	w.start()
	w.ledger.View(func(s *ledger.State) {
		if len(s.Keys()) != 21 {
			t.Errorf("there are %d keys, want 21", len(s.Keys()))
		}
		for grant, kid := range signed {
			if !s.Signs(kid, grant) {
				t.Errorf("key %s signed for grant %s, and the record does not say so", kid, grant)
			}
		}
		counts := s.SignedCounts()
		for _, k := range s.Keys() {
			if n := len(s.SignedBy(k.KID)); counts[k.KID] != n {
				t.Errorf("key %s signs for %d grants, and %d are counted", k.KID, n, counts[k.KID])
			}
		}
	})
	if len(signed) == 0 {
		t.Error("nothing was signed")
	}
}

// TestCutShort does every prefix of the steps of a rotation and of a first
// start, and then starts: one key, the ledger's, and nothing else left.
func TestCutShort(t *testing.T) {
	record := func(w *world, k *file) { w.append(ledger.NewKey(someone, public(k))) }
	for name, c := range map[string]struct {
		do    func(w *world)
		fresh bool // the key that was staged is the one in use
	}{
		"half of a key under another name": {func(w *world) { w.must(os.WriteFile(w.path(".signing-key-1"), []byte("-----BEG"), 0o600)) }, false},
		"staged":                           {func(w *world) { w.must(stage(w.dir, newFile(w.id, 1))) }, false},
		"staged, and half written":         {func(w *world) { w.must(os.WriteFile(w.path(nextName), []byte("-----BEG"), 0o600)) }, false},
		"staged and recorded": {func(w *world) {
			k := newFile(w.id, 1)
			w.must(stage(w.dir, k))
			record(w, k)
		}, true},
		"staged, recorded, and the old one damaged": {func(w *world) {
			k := newFile(w.id, 1)
			w.must(stage(w.dir, k))
			record(w, k)
			w.must(os.Truncate(w.path(fileName), 10))
		}, true},
		"all": {func(w *world) {
			k := newFile(w.id, 1)
			w.must(stage(w.dir, k))
			record(w, k)
			w.must(promote(w.dir))
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			r := w.start()
			was := r.kid
			g := w.grant("/a")
			token := w.mint(r, g)
			c.do(w)
			w.stop()
			for range 2 {
				r = w.start()
				if (r.kid != was) != c.fresh {
					t.Errorf("key %s is in use; before it was %s, want another: %v", r.kid, was, c.fresh)
				}
				keys := w.keys()
				if last := keys[len(keys)-1]; last.KID != r.kid || !last.Current {
					t.Errorf("the ledger's current key is %+v, and %s is in use", last, r.kid)
				}
				for _, token := range []capabilities.Token{token, w.mint(r, g)} {
					if err := w.verify(r, token); err != nil {
						t.Error(err)
					}
				}
				w.stop()
				if names := w.files(); !strings.HasSuffix(names, "ledger.anchor ledger.db ledger.lock signing-key.pem") {
					t.Errorf("the state directory holds %s", names)
				}
			}
		})
	}
}

// TestFirstStartCutShort does every prefix of a first start, and of the first
// one with a ledger of the release before.
func TestFirstStartCutShort(t *testing.T) {
	for _, release := range []string{"new", "upgraded"} {
		for steps := range 5 {
			t.Run(release+" "+string(rune('0'+steps)), func(t *testing.T) {
				w := newWorld(t)
				l, err := ledger.Open(t.Context(), ledger.Options{Dir: w.dir, Kinds: testKinds, Clock: w.offline().Clock})
				w.must(err)
				w.ledger = l
				l.View(func(s *ledger.State) { w.id = s.LedgerID() })
				k := newFile(w.id, 1)
				var g ledger.Grant
				if release == "upgraded" {
					g = w.grant("/a")
					w.must(os.WriteFile(w.path(fileName), encode(&file{private: k.private}), 0o600))
				}
				all := []func(){
					func() { w.must(l.Mark()) },
					func() { w.must(stage(w.dir, k)) },
					func() {
						if release == "upgraded" {
							w.must(promote(w.dir))
						}
					},
					func() { w.append(ledger.NewKey(someone, public(k))) },
				}
				for _, step := range all[:steps] {
					step()
				}
				w.stop()
				r := w.start()
				if keys := w.keys(); len(keys) != 1 || keys[0].KID != r.kid {
					t.Errorf("the keys are %+v, and %s is in use", keys, r.kid)
				}
				if release == "upgraded" {
					if r.kid != k.kid() {
						t.Errorf("key %s is in use, want that of the release before", r.kid)
					}
					if got := w.signedBy(r.kid); !slices.Contains(got, g.ID) {
						t.Errorf("it signs for %v, want also what was granted before it was on record", got)
					}
				}
				if text, _ := os.ReadFile(w.path(fileName)); !strings.Contains(string(text), "Ledger: "+w.id.String()) {
					t.Errorf("the key file does not name its ledger: %s", text)
				}
			})
		}
	}
}

func (w *world) signedBy(kid string) (out []uuid.UUID) {
	w.ledger.View(func(s *ledger.State) { out = s.SignedBy(kid) })
	return out
}

// TestOldCopyWithoutAnAnchor: a copy of before the upgrade has no keys and needs
// no anchor; the key file knows better.
func TestOldCopyWithoutAnAnchor(t *testing.T) {
	w := newWorld(t)
	l, err := ledger.Open(t.Context(), ledger.Options{Dir: w.dir, Kinds: testKinds, Clock: w.offline().Clock})
	w.must(err)
	w.must(l.Close())
	old, err := os.ReadFile(w.path("ledger.db"))
	w.must(err)
	w.start()
	w.grant("/a")
	w.stop()
	for _, name := range []string{"ledger.db", "ledger.db-wal", "ledger.db-shm", "ledger.anchor"} {
		w.must(errors.Join(ignoreMissing(os.Remove(w.path(name)))))
	}
	w.must(os.WriteFile(w.path("ledger.db"), old, 0o600))
	for range 2 {
		if err := w.tryStart(); !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), "its anchor is gone") || !strings.Contains(err.Error(), "ledger restore --state") {
			t.Errorf("got %v", err)
		}
	}
	// And without any database.
	w.must(os.Remove(w.path("ledger.db")))
	for range 2 {
		if err := w.tryStart(); !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), "the database was removed or swapped") {
			t.Errorf("got %v", err)
		}
	}
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

func TestOfflineRotation(t *testing.T) {
	w := newWorld(t)
	if _, err := w.offline().Rotate(t.Context()); err == nil || !strings.Contains(err.Error(), "there is no ledger in") {
		t.Errorf("without a ledger: %v", err)
	}
	if _, err := os.Stat(w.dir); err == nil {
		t.Error("it made a state directory")
	}
	r := w.start()
	token := w.mint(r, w.grant("/a"))
	if _, err := w.offline().Rotate(t.Context()); !errors.Is(err, ledger.ErrLocked) {
		t.Errorf("beside a broker: %v", err)
	}
	w.stop()
	kid, err := w.offline().Rotate(t.Context())
	w.must(err)
	r = w.start()
	if r.kid != kid {
		t.Errorf("key %s is in use, want %s", r.kid, kid)
	}
	if err := w.verify(r, token); err != nil {
		t.Errorf("a token of the key before: %v", err)
	}
}

// TestStagedKeyIsKept: whether the ledger has a key whose outcome is unknown is
// only seen when it is read again. Until then its seed is in one file, and nobody
// may put another there or take it away.
func TestStagedKeyIsKept(t *testing.T) {
	w := newWorld(t)
	fail := false
	l, err := ledger.Open(t.Context(), ledger.Options{Dir: w.dir, Kinds: testKinds, Clock: clock.System{}, Observe: func(ledger.Commit) {
		if fail {
			fail = false
			panic("a mistake, after the commit")
		}
	}})
	w.must(err)
	w.ledger = l
	r, err := Open(t.Context(), l, w.dir, testKinds, slog.New(slog.DiscardHandler))
	w.must(err)
	g := w.grant("/a")
	old := w.mint(r, g)
	staged, err := r.Stage()
	w.must(err)
	fail = true
	func() {
		defer func() { _ = recover() }()
		_, _ = l.Update(t.Context(), func(tx *ledger.Tx) error { return staged.Append(tx, someone) })
	}()
	if l.Poisoned() == nil {
		t.Fatal("the outcome is known")
	}
	w.must(staged.Done(ledger.ErrUnknownOutcome))
	if again, err := r.Stage(); !errors.Is(err, ledger.ErrPoisoned) {
		if err == nil {
			w.must(again.Done(ledger.ErrPoisoned))
		}
		t.Errorf("another key while the ledger is poisoned: %v", err)
	}
	w.must(l.Reopen(t.Context()))
	// Once more, and it is not recorded.
	again, err := r.Stage()
	w.must(err)
	w.must(again.Done(ledger.ErrNotRecorded))
	fresh := w.mint(r, g)
	for _, token := range []capabilities.Token{old, fresh} {
		if err := w.verify(r, token); err != nil {
			t.Error(err)
		}
	}
	if r.kid != staged.KID() {
		t.Errorf("key %s signs, and the ledger has %s", r.kid, staged.KID())
	}
	w.stop()
	w.start()
}
