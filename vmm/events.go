package vmm

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Events that the shim acts on, as (source, event) of an [Event].
var (
	EventBooted    = EventName{"vm", "booted"}
	EventShutdown  = EventName{"vm", "shutdown"}
	EventDeleted   = EventName{"vm", "deleted"}
	EventRebooting = EventName{"vm", "rebooting"}
	EventRebooted  = EventName{"vm", "rebooted"}
	EventRemoved   = EventName{"vm", "device-removed"} // properties: id, bdf
	EventPaused    = EventName{"vm", "paused"}
	EventResumed   = EventName{"vm", "resumed"}
	EventVMMExit   = EventName{"vmm", "shutdown"}
)

// EventName says what an event is about. Names of one source mean nothing for
// another: ("vm", "shutdown") and ("vmm", "shutdown") are different events.
type EventName struct{ Source, Event string }

// Event is one entry of the stream that Cloud Hypervisor writes to its
// --event-monitor file.
type Event struct {
	Since time.Duration // since the VMM's start
	EventName
	Properties map[string]string
}

// maxEvent bounds one event's text.
const maxEvent = 64 << 10

// ErrEventTooLong: more than 64 KiB came without an event's end.
var ErrEventTooLong = errors.New("event is longer than 65536 bytes")

// Events reads a stream of events: pretty-printed JSON objects, each followed
// by an empty line. An event that is still being written is waited for, so the
// reader should block at the end (a FIFO, a pipe); with a plain file, EOF in
// the middle of an event is io.ErrUnexpectedEOF.
type Events struct {
	r *bufio.Reader
}

// NewEvents returns a reader of the events in r.
func NewEvents(r io.Reader) *Events { return &Events{r: bufio.NewReader(r)} }

// Next returns the next event, or io.EOF at the end of the stream. After any
// error the stream cannot be read on.
func (e *Events) Next() (Event, error) {
	text, err := e.object()
	if err != nil {
		return Event{}, err
	}
	return ParseEvent(text)
}

// object collects lines until the empty one that ends an event. Strings in
// JSON hold no raw newline, so an empty line is never inside of one.
func (e *Events) object() ([]byte, error) {
	var text []byte
	lineStart := true // false: the last slice was only the start of a line
	for {
		line, err := e.r.ReadSlice('\n')
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("cannot read events: %w", err)
		}
		if len(text)+len(line) > maxEvent {
			return nil, ErrEventTooLong
		}
		blank := lineStart && len(bytes.TrimSpace(line)) == 0
		lineStart = err == nil
		atEOF := errors.Is(err, io.EOF)
		text = append(text, line...)
		switch {
		case atEOF && len(bytes.TrimSpace(text)) == 0:
			return nil, io.EOF
		case atEOF && !json.Valid(text):
			return nil, io.ErrUnexpectedEOF
		case atEOF, blank && err == nil && len(bytes.TrimSpace(text)) > 0:
			return text, nil
		case blank && err == nil:
			text = text[:0]
		}
	}
}

// wireEvent is an event as it is written.
type wireEvent struct {
	Timestamp  *wireTime         `json:"timestamp"`
	Source     string            `json:"source"`
	Event      string            `json:"event"`
	Properties map[string]string `json:"properties"`
}

type wireTime struct {
	Secs  uint64 `json:"secs"`
	Nanos uint32 `json:"nanos"`
}

// ParseEvent parses one event. Unknown fields are ignored, since they decide
// nothing; a missing or wrong timestamp, source or name is an error.
func ParseEvent(text []byte) (Event, error) {
	var w wireEvent
	if err := json.Unmarshal(text, &w); err != nil {
		return Event{}, fmt.Errorf("cannot parse an event: %w", err)
	}
	switch {
	case w.Timestamp == nil:
		return Event{}, errors.New("cannot parse an event: it has no timestamp")
	case w.Source == "" || w.Event == "":
		return Event{}, errors.New("cannot parse an event: it has no source or no name")
	case w.Timestamp.Secs > 1<<32 || w.Timestamp.Nanos >= 1e9:
		return Event{}, errors.New("cannot parse an event: its timestamp is out of range")
	}
	return Event{
		Since:      time.Duration(w.Timestamp.Secs)*time.Second + time.Duration(w.Timestamp.Nanos),
		EventName:  EventName{w.Source, w.Event},
		Properties: w.Properties,
	}, nil
}

// MarshalText writes an event as Cloud Hypervisor does, without the empty line
// after it.
func (e Event) MarshalText() ([]byte, error) {
	return json.MarshalIndent(wireEvent{
		Timestamp:  &wireTime{uint64(e.Since / time.Second), uint32(e.Since % time.Second)},
		Source:     e.Source,
		Event:      e.Event,
		Properties: e.Properties,
	}, "", "  ")
}
