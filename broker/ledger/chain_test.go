package ledger

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/clock"
)

// written makes a ledger of five events in a directory that no cleanup checks.
func written(t *testing.T) (dir string, head Hash) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "spoilt")
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.NewFake()})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		id := uuid.New()
		put(t, l, requested(id, GrantRecord{Capability: capability(t, fmt.Sprintf("/d%d", i))}))
		put(t, l, NewChange(GrantActive, someone, id, Change{Reason: "r"}))
	}
	_, head = l.Head()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, head
}

func spoil(t *testing.T, dir, query string, args ...any) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(query, args...); err != nil {
		t.Fatal(err)
	}
}

func row(t *testing.T, dir string, seq int) (body, hash []byte) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.QueryRow("SELECT body, hash FROM events WHERE seq = ?", seq).Scan(&body, &hash); err != nil {
		t.Fatal(err)
	}
	return body, hash
}

// TestTampering changes a ledger in every way that its file allows, and wants
// the first broken link named, by Verify and by Open.
func TestTampering(t *testing.T) {
	rehash := func(body []byte) []byte {
		h := hashRecord(body)
		return h[:]
	}
	for name, c := range map[string]struct {
		spoil   func(t *testing.T, dir string)
		seq     uint64
		problem string
	}{
		"a flipped byte": {func(t *testing.T, dir string) {
			body, _ := row(t, dir, 3)
			body[len(body)-1] ^= 1
			spoil(t, dir, "UPDATE events SET body = ? WHERE seq = 3", body)
		}, 3, BrokenHash},
		"a flipped hash": {func(t *testing.T, dir string) {
			_, hash := row(t, dir, 4)
			hash[0] ^= 1
			spoil(t, dir, "UPDATE events SET hash = ? WHERE seq = 4", hash)
		}, 4, BrokenHash},
		"a deleted row":   {func(t *testing.T, dir string) { spoil(t, dir, "DELETE FROM events WHERE seq = 3") }, 4, BrokenGap},
		"the first row":   {func(t *testing.T, dir string) { spoil(t, dir, "DELETE FROM events WHERE seq = 1") }, 2, BrokenGap},
		"all rows":        {func(t *testing.T, dir string) { spoil(t, dir, "DELETE FROM events") }, 1, BrokenGap},
		"renumbered rows": {func(t *testing.T, dir string) { spoil(t, dir, "UPDATE events SET seq = 9 WHERE seq = 5") }, 9, BrokenGap},
		"swapped rows": {func(t *testing.T, dir string) {
			spoil(t, dir, "UPDATE events SET seq = seq * -1 WHERE seq IN (2, 4)")
			spoil(t, dir, "UPDATE events SET seq = 4 WHERE seq = -2")
			spoil(t, dir, "UPDATE events SET seq = 2 WHERE seq = -4")
		}, 2, BrokenUndecodable},
		"an edited row with a fresh hash": {func(t *testing.T, dir string) {
			body, _ := row(t, dir, 3)
			body = bytes.Replace(body, []byte(`"r"`), []byte(`"s"`), 1)
			spoil(t, dir, "UPDATE events SET body = ?, hash = ? WHERE seq = 3", body, rehash(body))
		}, 4, BrokenPrev},
		"a forged row": {func(t *testing.T, dir string) {
			body := encodeEvent(nil, &Event{Seq: 6, Type: GrantRevoking, Actor: someone, Grant: uuid.New()}, dataNone, nil)
			spoil(t, dir, "INSERT INTO events VALUES (6, ?, ?)", body, rehash(body))
		}, 6, BrokenPrev},
		"a forged row that fits, of an illegal move": {func(t *testing.T, dir string) {
			_, last := row(t, dir, 5)
			e := Event{Seq: 6, Type: GrantActive, Actor: someone, Grant: uuid.New()}
			copy(e.Prev[:], last)
			body := encodeEvent(nil, &e, dataNone, nil)
			spoil(t, dir, "INSERT INTO events VALUES (6, ?, ?)", body, rehash(body))
		}, 6, BrokenIllegal},
		"not the canonical form": {func(t *testing.T, dir string) {
			body, _ := row(t, dir, 5)
			body = append(body, 0)
			spoil(t, dir, "UPDATE events SET body = ?, hash = ? WHERE seq = 5", body, rehash(body))
		}, 5, BrokenUndecodable},
	} {
		t.Run(name, func(t *testing.T) {
			dir, _ := written(t)
			c.spoil(t, dir)
			r, err := Verify(context.Background(), dir)
			if err != nil || r.Broken == nil || r.Broken.Seq != c.seq || r.Broken.Problem != c.problem {
				t.Errorf("Verify: %v, %v; want event %d, %s", r.Broken, err, c.seq, c.problem)
			}
			_, err = Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.NewFake()})
			if broken, ok := errors.AsType[*ChainError](err); !ok || broken.Seq != c.seq {
				t.Errorf("Open: %v, want it to be refused at event %d", err, c.seq)
			}
		})
	}
}

// TestCutOffTail shows what the chain cannot show, and that an anchor can.
func TestCutOffTail(t *testing.T) {
	dir, head := written(t)
	anchor := Anchor{Seq: 5, Hash: head}
	if r, err := Verify(context.Background(), dir, anchor); err != nil || r.Broken != nil {
		t.Fatalf("whole: %v, %v", r.Broken, err)
	}
	spoil(t, dir, "DELETE FROM events WHERE seq = 5")
	if r, err := Verify(context.Background(), dir); err != nil || r.Broken != nil || r.Events != 4 {
		t.Errorf("without an anchor: %+v, %v", r, err)
	}
	r, err := Verify(context.Background(), dir, anchor)
	if err != nil || r.Broken == nil || r.Broken.Problem != BrokenAnchor || r.Broken.Seq != 5 {
		t.Errorf("with an anchor: %v, %v", r.Broken, err)
	}
	r, err = Verify(context.Background(), dir, Anchor{Seq: 3, Hash: Hash{1}})
	if err != nil || r.Broken == nil || r.Broken.Problem != BrokenAnchor || r.Broken.Seq != 3 {
		t.Errorf("with another ledger's anchor: %v, %v", r.Broken, err)
	}
}

func TestEventsAreCheckedWhenTheyAreRead(t *testing.T) {
	dir, _ := written(t)
	l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.NewFake()})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	body, _ := row(t, dir, 3)
	body[len(body)-1] ^= 1
	spoil(t, dir, "UPDATE events SET body = ? WHERE seq = 3", body)
	_, err = l.Events(0, EventFilter{}, 0)
	if broken, ok := errors.AsType[*ChainError](err); !ok || broken.Seq != 3 || broken.Problem != BrokenHash {
		t.Errorf("got %v", err)
	}
}

func TestRefusedFiles(t *testing.T) {
	open := func(dir string) error {
		l, err := Open(context.Background(), Options{Dir: dir, Kinds: testKinds, Clock: clock.NewFake()})
		if err == nil {
			_ = l.Close()
		}
		return err
	}
	dir, _ := written(t)
	spoil(t, dir, fmt.Sprintf("PRAGMA user_version = %d", len(migrations)+1))
	if err := open(dir); !errors.Is(err, ErrNewerSchema) || !strings.Contains(err.Error(), fmt.Sprint(len(migrations)+1)) {
		t.Errorf("a newer schema: %v", err)
	}
	other := t.TempDir()
	spoil(t, other, "CREATE TABLE shopping (item TEXT)")
	if err := open(other); !errors.Is(err, ErrNotLedger) {
		t.Errorf("another program's database: %v", err)
	}
	garbage := t.TempDir()
	if err := os.WriteFile(filepath.Join(garbage, fileName), bytes.Repeat([]byte("garbage"), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := open(garbage); err == nil {
		t.Error("garbage is accepted")
	}
	if raw, _ := os.ReadFile(filepath.Join(garbage, fileName)); !bytes.HasPrefix(raw, []byte("garbage")) {
		t.Error("what was refused was changed")
	}
	if _, err := Verify(context.Background(), t.TempDir()); err == nil {
		t.Error("a directory without a ledger verifies")
	}
}

func FuzzDecodeEvent(f *testing.F) {
	for _, e := range []Event{
		{Seq: 1, Type: LedgerCreated, Actor: someone},
		{Seq: 2, Type: VMBound, Actor: someone, VM: holder, Partition: partition},
	} {
		f.Add(encodeEvent(nil, &e, dataJSON, []byte(`{"a":1}`)))
	}
	depth := 300
	r := request{
		parent: holder, capability: []byte(`{}`), hasResource: true, hasDeadline: true, wall: 1, boot: 200,
		limits: Limits{MaxDepth: &depth}, persist: true, decision: []byte(`1`),
	}
	f.Add(encodeEvent(nil, &Event{Seq: 3, Type: GrantRequested, Actor: someone, Grant: holder, VM: holder}, dataRequest, encodeRequest(nil, &r)))
	f.Fuzz(func(t *testing.T, record []byte) {
		var e entry
		if decodeEvent(record, &e) != nil {
			return
		}
		if again := encodeEvent(nil, &e.Event, e.dataKind, e.data); !bytes.Equal(again, record) {
			t.Fatalf("%x decodes, and encodes to %x", record, again)
		}
		if e.dataKind == dataRequest {
			if again := encodeRequest(nil, &e.req); !bytes.Equal(again, e.data) {
				t.Fatalf("request %x decodes, and encodes to %x", e.data, again)
			}
		}
		if v, err := e.public(Hash{}); err == nil && len(v.Data) > 0 && !json.Valid(v.Data) {
			t.Fatalf("%x has data that is not JSON: %q", record, v.Data)
		}
		_ = (&folder{newInterner()}).fold(newLayer(nil), &e) // whatever it says, without a panic
	})
}

func TestCorpusIsThere(t *testing.T) {
	seeds, err := filepath.Glob("testdata/fuzz/FuzzDecodeEvent/*")
	if err != nil || len(seeds) == 0 {
		t.Errorf("no seeds for FuzzDecodeEvent: %v", err)
	}
}
