package broker

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/ledger"
	"spectrum-os.org/broker/capabilities"
)

// asked is what a VM was given that asked for itself, with its token.
func (g *granting) asked(vm uuid.UUID, path string) api.GuestGrant {
	g.t.Helper()
	g.ready.Store(true)
	g.quotas.perMinute, g.quotas.burst = 60, 60
	got, err := guestService{g.Broker}.Request(g.t.Context(), vm, api.GuestRequest{Capability: "fs:ro:self:" + path})
	if err != nil {
		g.t.Fatal(err)
	}
	return got
}

// presents is what becomes of a token that a VM shows.
func (g *granting) presents(vm uuid.UUID, token string) error {
	_, err := guestService{g.Broker}.ownToken(g.t.Context(), vm, token)
	return err
}

func person() api.Caller { return api.Caller{Kind: api.CallerPerson, UID: 1000, PID: 7} }

func (g *granting) currentKey() api.Key {
	g.t.Helper()
	list, err := g.ListKeys(g.t.Context())
	if err != nil || len(list) == 0 || list[len(list)-1].State != api.KeyCurrent {
		g.t.Fatalf("the keys are %+v, %v", list, err)
	}
	return list[len(list)-1]
}

func TestRotatedKeyEndsNothing(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	first := g.currentKey()
	made := g.asked(mail1, "/docs")
	second, err := g.RotateKeys(t.Context(), person())
	if err != nil || second.KID == first.KID || second.State != api.KeyCurrent {
		t.Fatalf("rotated to %+v, %v", second, err)
	}
	if err := g.presents(mail1, made.Token); err != nil {
		t.Errorf("a token of the retired key: %v", err)
	}
	if now := g.look(made.ID); now.State != ledger.Active {
		t.Errorf("its grant is %s", now.State)
	}
	// A person is handed a token of a grant that was made before: the new key
	// signs for it as well, and the record says so.
	token, err := g.Token(t.Context(), person(), made.ID.String())
	if err != nil {
		t.Fatal(err)
	}
	if err := g.presents(mail1, token.Token); err != nil {
		t.Errorf("a token of the new key: %v", err)
	}
	list, _ := g.ListKeys(t.Context())
	if len(list) != 2 || list[0].State != api.KeyRetired || list[0].Grants != 1 || list[1].Grants != 1 {
		t.Errorf("the keys are %+v", list)
	}
	created := g.events(ledger.KeyCreated)
	if last := created[len(created)-1]; last.Actor.UID == nil || *last.Actor.UID != 1000 {
		t.Errorf("on record is %+v", last.Actor)
	}
}

// TestRevokedKeyEndsWhatItSigned: a retired key and the current one.
func TestRevokedKeyEndsWhatItSigned(t *testing.T) {
	for _, which := range []string{"retired", "current"} {
		t.Run(which, func(t *testing.T) {
			g := newGranting(t, allowsAll, allowsAll)
			key := g.currentKey()
			during := g.asked(mail1, "/docs")
			parent := g.granted(mail1, "/parent")
			child := g.granted(mail1, "/parent/child", func(r *request) { r.parent = &parent }).ID
			other := g.granted(mail2, "/theirs")
			var later ledger.Grant
			if which == "retired" {
				if _, err := g.RotateKeys(t.Context(), person()); err != nil {
					t.Fatal(err)
				}
				later = g.granted(mail1, "/later")
			}
			res, err := g.RevokeKey(t.Context(), person(), key.KID[:6], api.RevokeKeyRequest{Reason: "stolen", Wait: true, TimeoutSeconds: 20})
			if err != nil {
				t.Fatal(err)
			}
			if res.Key.KID != key.KID || res.Key.State != api.KeyRevoked || res.Key.Reason != "stolen" || res.Current.KID == key.KID || res.Current.State != api.KeyCurrent {
				t.Errorf("the answer is about %+v, and now signs %+v", res.Key, res.Current)
			}
			if len(res.Revoked) != 4 || len(res.Revoking) != 0 {
				t.Errorf("%d are revoked and %d not yet", len(res.Revoked), len(res.Revoking))
			}
			for _, id := range []uuid.UUID{during.ID, parent.ID, child, other.ID} {
				now := g.look(id)
				if now.State != ledger.Revoked || g.things.has(id) || !strings.Contains(now.Reason, key.KID+" was revoked: stolen") && id != child {
					t.Errorf("grant %s is %s (%s), and there: %v", id, now.State, now.Reason, g.things.has(id))
				}
			}
			if later.ID != uuid.Nil {
				if now := g.look(later.ID); now.State != ledger.Active || !g.things.has(later.ID) {
					t.Errorf("what the next key signs for is %s", now.State)
				}
			}
			g.refusedToken(mail1, during.Token, capabilities.ErrTokenKeyRevoked)
			// All in one commit: the new key first, and then what ends.
			events := g.events(ledger.KeyRevoked)
			if len(events) != 1 || events[0].Actor.UID == nil {
				t.Fatalf("on record is %v", events)
			}
			after, err := g.ledger.Events(events[0].Seq-2, ledger.EventFilter{}, 3)
			if err != nil || which == "current" && after[0].Type != ledger.KeyCreated || after[1].Type != ledger.KeyRevoked || after[2].Type != ledger.GrantRevoking {
				t.Errorf("around it on record: %v, %v", after, err)
			}
			if _, err := g.RevokeKey(t.Context(), person(), key.KID, api.RevokeKeyRequest{}); api.CodeOf(err) != api.CodeConflict || !strings.Contains(err.Error(), "was revoked already") {
				t.Errorf("a second time: %v", err)
			}
			// Life goes on with the new key.
			if err := g.presents(mail1, g.asked(mail1, "/more").Token); err != nil {
				t.Errorf("a token of the new key: %v", err)
			}
		})
	}
}

// refusedToken asserts why a token is refused, in the answer and on record.
func (g *granting) refusedToken(vm uuid.UUID, token string, why error) {
	g.t.Helper()
	before := len(g.events(ledger.TokenRefused))
	if err := g.presents(vm, token); !errors.Is(err, why) {
		g.t.Errorf("the token: %v, want %v", err, why)
	}
	on := g.events(ledger.TokenRefused)
	if len(on) != before+1 || !strings.Contains(string(on[len(on)-1].Data), why.Error()) {
		g.t.Errorf("on record is %v", on)
	}
}

// TestKeySignsForWhatItIssued: a token that the new key signed for an older
// grant ends that grant, when the new key is revoked.
func TestKeySignsForWhatItIssued(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	issued, untouched := g.granted(mail1, "/issued"), g.granted(mail1, "/untouched")
	second, err := g.RotateKeys(t.Context(), person())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := g.Token(t.Context(), person(), issued.ID.String()); err != nil {
		t.Fatal(err)
	}
	if _, err := g.RevokeKey(t.Context(), person(), second.KID, api.RevokeKeyRequest{Wait: true, TimeoutSeconds: 20}); err != nil {
		t.Fatal(err)
	}
	if now := g.look(issued.ID); now.State != ledger.Revoked {
		t.Errorf("what it signed for is %s", now.State)
	}
	if now := g.look(untouched.ID); now.State != ledger.Active {
		t.Errorf("what it did not sign for is %s (%s)", now.State, now.Reason)
	}
}

func TestKeyReferences(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	for ref, code := range map[string]api.Code{
		"": api.CodeInvalid, "abc": api.CodeInvalid, "ABCDEF": api.CodeInvalid, "xyzw": api.CodeInvalid,
		"00112233445566778": api.CodeInvalid, "../..": api.CodeInvalid,
	} {
		if _, err := g.RevokeKey(t.Context(), person(), ref, api.RevokeKeyRequest{}); api.CodeOf(err) != code {
			t.Errorf("%q: %v, want %s", ref, err, code)
		}
	}
	unknown := "0000"
	if strings.HasPrefix(g.currentKey().KID, unknown) {
		unknown = "1111"
	}
	if _, err := g.RevokeKey(t.Context(), person(), unknown, api.RevokeKeyRequest{}); api.CodeOf(err) != api.CodeNotFound {
		t.Errorf("of no key: %v", err)
	}
	if n := len(g.events(ledger.KeyRevoked)); n != 0 {
		t.Errorf("%d keys were revoked", n)
	}
}

// holdLedger keeps everybody from writing to the ledger, until it is called.
func (g *granting) holdLedger() (release func()) {
	g.t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(g.o.StateDir, "ledger.db"))
	if err != nil {
		g.t.Fatal(err)
	}
	conn, err := db.Conn(context.Background())
	if err == nil {
		_, err = conn.ExecContext(context.Background(), "BEGIN IMMEDIATE")
	}
	if err != nil {
		g.t.Fatal(err)
	}
	return func() {
		_, err := conn.ExecContext(context.Background(), "ROLLBACK")
		if err := errors.Join(err, conn.Close(), db.Close()); err != nil {
			g.t.Error(err)
		}
	}
}

// TestKeyRevocationThatCannotBeRecorded cuts all the same, refuses the key's
// tokens, leaves a tombstone that a restart honours, and is recorded when it can
// be.
func TestKeyRevocationThatCannotBeRecorded(t *testing.T) {
	for name, block := range map[string]func(g *granting) (release func()){
		"the ledger": (*granting).holdLedger,
		"the new key": func(g *granting) func() {
			path := filepath.Join(g.o.StateDir, "signing-key.next.pem")
			if err := os.Mkdir(path, 0o700); err != nil {
				g.t.Fatal(err)
			}
			return func() { _ = os.Remove(path) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGranting(t, allowsAll, allowsAll)
			key := g.currentKey()
			made := g.asked(mail1, "/docs")
			g.awaitState(made.ID, ledger.Active)
			release := block(g)
			_, err := g.RevokeKey(t.Context(), person(), key.KID, api.RevokeKeyRequest{Reason: "stolen", Wait: true})
			if api.CodeOf(err) != api.CodeUnavailable || !strings.Contains(err.Error(), "access was cut, but the revocation could not be recorded") {
				t.Errorf("got %v", err)
			}
			if g.things.has(made.ID) {
				t.Error("access was not cut")
			}
			if err := g.presents(mail1, made.Token); !errors.Is(err, capabilities.ErrTokenKeyRevoked) {
				t.Errorf("its token: %v", err)
			}
			if _, err := g.Token(t.Context(), person(), made.ID.String()); api.CodeOf(err) != api.CodeConflict || !strings.Contains(err.Error(), "revoked, which is not on record yet") {
				t.Errorf("the barred key signs: %v", err)
			}
			if list, _ := g.ListKeys(t.Context()); list[0].State != api.KeyRevoked || !strings.Contains(list[0].Reason, "not on record yet") {
				t.Errorf("the keys are %+v", list)
			}
			tomb := filepath.Join(g.o.RuntimeDir, "revoked-keys", key.KID)
			var on keyTombstone
			if body, err := os.ReadFile(tomb); err != nil || json.Unmarshal(body, &on) != nil || on.Reason != "stolen" {
				t.Fatalf("the tombstone is %+v, %v", on, err)
			}
			if err := g.recordKeyTombstones(t.Context()); err == nil {
				t.Error("it was recorded although it cannot be")
			}
			release()
			// A broker that starts now knows only what is on the disk.
			g.mu.Lock()
			g.barredKeys = map[string]keyTombstone{}
			g.mu.Unlock()
			g.keys.Unbar(key.KID)
			if err := os.WriteFile(filepath.Join(g.o.RuntimeDir, "revoked-keys", "x"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := g.findKeyTombstones(t.Context()); err != nil {
				t.Fatal(err)
			}
			if now := g.currentKey(); now.KID == key.KID {
				t.Error("the revoked key is current")
			}
			g.refusedToken(mail1, made.Token, capabilities.ErrTokenKeyRevoked)
			revoked := g.events(ledger.KeyRevoked)
			if len(revoked) != 1 || revoked[0].Actor.UID == nil || *revoked[0].Actor.UID != 1000 {
				t.Errorf("on record is %v", revoked)
			}
			if now := g.look(made.ID); !now.State.Ended() || !strings.Contains(now.Reason, key.KID) {
				t.Errorf("its grant is %s (%s)", now.State, now.Reason)
			}
			if _, err := os.Stat(tomb); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the tombstone stays: %v", err)
			}
		})
	}
}

// TestRevokingAKeyTwiceAtOnce: both succeed or one is told, and one event says it.
func TestRevokingAKeyTwiceAtOnce(t *testing.T) {
	g := newGranting(t, allowsAll, allowsAll)
	made := g.granted(mail1, "/docs")
	key := g.currentKey()
	errs := make(chan error, 4)
	for range 4 {
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			_, err := g.revokeKey(ctx, brokerActor, key.KID, "stolen", true)
			errs <- err
		}()
	}
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if n := len(g.events(ledger.KeyRevoked)); n != 1 {
		t.Errorf("%d events say it", n)
	}
	if now := g.look(made.ID); now.State != ledger.Revoked {
		t.Errorf("its grant is %s", now.State)
	}
	if err := g.presents(mail1, g.asked(mail1, "/more").Token); err != nil {
		t.Errorf("with the new key: %v", err)
	}
}
