package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
	"spectrum-os.org/broker/clock"
)

func TestDecodeRequest(t *testing.T) {
	good := `{"op":"put","object":{"id":"a-1","generation":1,"instance":"i","tag":"t","uid":1,"gid":2}}`
	if _, err := decodeRequest([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for packet, want := range map[string]string{
		``:                                     "not understood",
		`{}`:                                   "unknown",
		`[]`:                                   "not understood",
		`{"op":"up"}`:                          `"up" is unknown`,
		`{"op":"state"} {"op":"state"}`:        "after the value",
		`{"op":"state","extra":1}`:             "extra",
		`{"op":"put"}`:                         "an object belongs to a put",
		`{"op":"state","object":{}}`:           "an object belongs to a put",
		`{"op":"remove"}`:                      "object id",
		`{"op":"remove","id":"../x"}`:          "is not of",
		`{"op":"remove","id":"A"}`:             "is not of",
		`{"op":"extend","id":"a"}`:             "no generation",
		`{"op":"extend","generation":1}`:       "object id",
		`{"op":"stop","grace_ms":-1}`:          "grace",
		`{"op":"stop","grace_ms":99999999999}`: "grace",

		strings.Replace(good, `"t"`, `"a/b"`, 1):                      "tag",
		strings.Replace(good, `"t"`, `""`, 1):                         "tag",
		strings.Replace(good, `:1,"i`, `:0,"i`, 1):                    "no generation",
		strings.Replace(good, `"uid"`, `"single_file":"..","uid"`, 1): "base name",
	} {
		_, err := decodeRequest([]byte(packet))
		var refused *Error
		if !errors.As(err, &refused) || refused.Code != CodeBadRequest || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", packet, err, want)
		}
	}
}

func FuzzDecodeRequest(f *testing.F) {
	f.Add([]byte(`{"op":"ping"}`))
	f.Fuzz(func(t *testing.T, packet []byte) {
		r, err := decodeRequest(packet)
		if err != nil {
			return
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeRequest(again)
		if err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		twice, _ := json.Marshal(back)
		if !bytes.Equal(again, twice) {
			t.Fatalf("%s became %s", again, twice)
		}
	})
}

func TestCorpusIsThere(t *testing.T) {
	files, _ := filepath.Glob("testdata/fuzz/FuzzDecodeRequest/*")
	if len(files) < 5 {
		t.Fatalf("the committed corpus has %d files", len(files))
	}
}

// The fullest state fits into a reply.
func TestFullStateFits(t *testing.T) {
	st := State{VM: uuid.New(), Instance: uuid.NewString()}
	now := clock.System{}.Now()
	for range maxSegments * slotsPerSegment {
		id := uuid.NewString()
		st.Objects = append(st.Objects, ObjectState{
			ID: id, Generation: 1 << 62, Phase: Detaching, Tag: id, Since: time.Now(),
			Deadline: capabilities.NewDeadline(now, time.Hour),
			PIDs:     []Proc{{PID: 1 << 22, Start: 1 << 40, BootID: now.BootID, Role: "fs/" + id}},
		})
	}
	b, err := json.Marshal(&reply{State: &st})
	if err != nil || len(b) > maxReply {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

func TestErrorIs(t *testing.T) {
	err := fmt.Errorf("wrapped: %w", refuse(CodeNoSlots, "none"))
	if !errors.Is(err, &Error{Code: CodeNoSlots}) || errors.Is(err, &Error{Code: CodeVMM}) {
		t.Error("errors.Is does not compare codes")
	}
}

func TestSlots(t *testing.T) {
	s := newSlots(5, 3)
	if s.total() != 5*slotsPerSegment-3 || s.total() < 100 {
		t.Fatalf("%d slots", s.total())
	}
	var taken []int
	for {
		seg, ok := s.take()
		if !ok {
			break
		}
		taken = append(taken, seg)
	}
	if len(taken) != 5*slotsPerSegment-3 || taken[0] == 0 || taken[len(taken)-1] != 0 {
		t.Errorf("taken: %v", taken)
	}
	s.give(2)
	if seg, ok := s.take(); !ok || seg != 2 {
		t.Errorf("took %d, %v", seg, ok)
	}
}

func TestGraveyard(t *testing.T) {
	g := newGraveyard()
	g.put("a", 3)
	g.put("a", 2)
	if !g.has("a", 3) || g.has("a", 4) || g.has("b", 0) {
		t.Error("generations are confused")
	}
	for i := range 2 * maxBuried {
		g.put(fmt.Sprint(i), 1)
	}
	if len(g.gens) != maxBuried || len(g.order) != maxBuried || g.has("a", 1) {
		t.Errorf("%d, %d remembered", len(g.gens), len(g.order))
	}
}

func TestDynamicFiles(t *testing.T) {
	f, err := os.Open("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files, err := dynamicFiles(f)
	if err != nil {
		t.Fatal(err)
	}
	var libc bool
	for _, n := range files {
		if _, err := os.Stat(n.host); err != nil || filepath.IsAbs(n.inside) {
			t.Errorf("%+v: %v", n, err)
		}
		libc = libc || strings.HasPrefix(filepath.Base(n.inside), "libc.so")
	}
	if len(files) > 0 && !libc {
		t.Errorf("no libc: %v", files)
	}
}

// Every code of the package is a distinct word.
func TestCodes(t *testing.T) {
	codes := []string{
		CodeNoSlots, CodeStaleGeneration, CodeWrongInstance, CodeVMM, CodeLaunch,
		CodeNotRunning, CodeBadRequest, CodeExpired, CodeRemoved, CodeRetired,
	}
	seen := map[string]bool{}
	for _, c := range codes {
		if seen[c] {
			t.Errorf("%s is twice", c)
		}
		seen[c] = true
	}
	if reflect.DeepEqual(refuse(CodeVMM, "x"), refuse(CodeLaunch, "x")) {
		t.Error("codes are not compared")
	}
}
