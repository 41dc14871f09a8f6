package vmm

import (
	"bytes"
	"errors"
	"io"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

const stream = `{
  "timestamp": {
    "secs": 0,
    "nanos": 31500000
  },
  "source": "vm",
  "event": "booting",
  "properties": null
}

{
  "timestamp": {
    "secs": 12,
    "nanos": 5
  },
  "source": "vm",
  "event": "device-removed",
  "properties": {
    "id": "one",
    "bdf": "0001:00:02.0"
  }
}

`

func TestEvents(t *testing.T) {
	want := []Event{
		{Since: 31500 * time.Microsecond, EventName: EventName{"vm", "booting"}},
		{
			Since: 12*time.Second + 5, EventName: EventRemoved,
			Properties: map[string]string{"id": "one", "bdf": "0001:00:02.0"},
		},
	}
	// Whole, byte by byte, and with the last empty line not yet written.
	for name, r := range map[string]io.Reader{
		"whole":        strings.NewReader(stream),
		"byte by byte": iotest.OneByteReader(strings.NewReader(stream)),
		"no last line": strings.NewReader(strings.TrimRight(stream, "\n")),
	} {
		events := NewEvents(r)
		for _, w := range want {
			if e, err := events.Next(); err != nil || !reflect.DeepEqual(e, w) {
				t.Errorf("%s: %+v, %v; want %+v", name, e, err, w)
			}
		}
		if _, err := events.Next(); !errors.Is(err, io.EOF) {
			t.Errorf("%s: at the end: %v", name, err)
		}
	}
}

func TestEventsRefuses(t *testing.T) {
	const head = `{"timestamp":{"secs":1,"nanos":0},`
	for _, tt := range []struct{ text, want string }{
		{stream[:100], "unexpected EOF"},
		{strings.Repeat("x", maxEvent+1), "longer than"},
		{head + `"source":"vm","event":"` + strings.Repeat("y", maxEvent) + `"}`, "longer than"},
		{"}\n\n", "cannot parse"},
		{`{"source":"vm","event":"e"}`, "no timestamp"},
		{head + `"event":"e"}`, "no source"},
		{head + `"source":"vm"}`, "no name"},
		{head + `"source":1,"event":"e"}`, "cannot parse"},
		{head + `"source":"vm","event":"e","properties":{"a":1}}`, "cannot parse"},
		{`{"timestamp":{"secs":1,"nanos":1000000000},"source":"a","event":"b"}`, "out of range"},
		{`{"timestamp":{"secs":18446744073709551615,"nanos":0},"source":"a","event":"b"}`, "out of range"},
		{`{"timestamp":{"secs":-1,"nanos":0},"source":"a","event":"b"}`, "cannot parse"},
	} {
		_, err := NewEvents(strings.NewReader(tt.text)).Next()
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.60s: %v; want %q", tt.text, err, tt.want)
		}
	}
}

// TestLongLineOfBlanks: a line that is longer than the reader's buffer is one
// line, whatever its end looks like.
func TestLongLineOfBlanks(t *testing.T) {
	text := `{"timestamp":{"secs":1,"nanos":0},"source":"vm",` + strings.Repeat(" ", 5000) + "\n" + `"event":"e"}` + "\n\n"
	if e, err := NewEvents(strings.NewReader(text)).Next(); err != nil || e.Event != "e" {
		t.Errorf("%+v, %v", e, err)
	}
}

func FuzzEvents(f *testing.F) {
	if seeds, err := filepath.Glob("testdata/fuzz/FuzzEvents/*"); err != nil || len(seeds) == 0 {
		f.Fatalf("no committed corpus: %v", err)
	}
	f.Add([]byte(stream))
	f.Fuzz(func(t *testing.T, data []byte) {
		events := NewEvents(bytes.NewReader(data))
		for {
			e, err := events.Next()
			if err != nil {
				return
			}
			// What was read can be written and read again, unchanged.
			text, err := e.MarshalText()
			if err != nil {
				t.Fatal(err)
			}
			if len(text) > maxEvent-2 {
				continue // escapes made it longer than it came
			}
			again, err := NewEvents(bytes.NewReader(append(text, "\n\n"...))).Next()
			if err != nil || !reflect.DeepEqual(again, e) {
				t.Fatalf("%+v came back as %+v, %v", e, again, err)
			}
		}
	})
}
