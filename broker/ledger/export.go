package ledger

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// An export is lines of JSON: a head, one line for each event with its record,
// and an end, without which it is not whole. Each event's hash can be computed
// from its record, and what people read of it follows from the record too, so
// that neither can be changed without the other.
const (
	exportFormat  = "spectrum-broker audit export"
	exportVersion = 1
)

type exportHead struct {
	Format  string `json:"format"`
	Version int    `json:"version"`
	First   uint64 `json:"first"` // event; the export's
	Prev    Hash   `json:"prev"`  // hash of the event before it
}

type exportLine struct {
	Event
	Record []byte `json:"record"`
}

type exportEnd struct {
	Events uint64 `json:"events"`
	Last   uint64 `json:"last"`
	Head   Hash   `json:"head"` // hash of the last event
}

// Exporter writes an export.
type Exporter struct {
	w     *bufio.Writer
	chain *chain
}

// NewExporter returns an Exporter of events in order, the first of which may be
// any.
func NewExporter(w io.Writer) *Exporter {
	return &Exporter{w: bufio.NewWriter(w), chain: newChain(nil)}
}

// Add writes an event. It must be the one that follows the last.
func (x *Exporter) Add(record []byte) error {
	e, hash, err := x.chain.next(record)
	if err != nil {
		return err
	}
	if x.chain.events == 1 {
		if err := x.line(exportHead{exportFormat, exportVersion, e.Seq, e.Prev}); err != nil {
			return err
		}
	}
	v, err := e.public(hash)
	if err != nil {
		return err
	}
	return x.line(exportLine{v, record})
}

// End writes the end, and must be called for the export to be whole. It returns
// what was written.
func (x *Exporter) End() (VerifyReport, error) {
	c := x.chain
	if c.events == 0 {
		return VerifyReport{}, errors.New("there is no event to export")
	}
	if err := x.line(exportEnd{uint64(c.events), c.last, c.hash}); err != nil {
		return VerifyReport{}, err
	}
	if err := x.w.Flush(); err != nil {
		return VerifyReport{}, fmt.Errorf("cannot write the export: %w", err)
	}
	return c.report(nil)
}

func (x *Exporter) line(v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		_, err = x.w.Write(append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("cannot write the export: %w", err)
	}
	return nil
}

// next adds an event of which only the record is known. The first one may be any.
func (c *chain) next(record []byte) (*entry, Hash, error) {
	hash := hashRecord(record)
	if c.events == 0 {
		if err := decodeEvent(record, &c.e); err != nil {
			return nil, hash, &ChainError{Seq: c.last + 1, Problem: BrokenUndecodable, Detail: err.Error()}
		}
		c.last, c.hash = c.e.Seq-1, c.e.Prev
	}
	if err := decodeEvent(record, &c.e); err != nil {
		return nil, hash, &ChainError{Seq: c.last + 1, Problem: BrokenUndecodable, Detail: err.Error()}
	}
	if err := c.add(c.e.Seq, record, hash, nil); err != nil {
		return nil, hash, err
	}
	return &c.e, hash, nil
}

// ErrNotExport: a file is no export of the audit, or not all of one.
var ErrNotExport = errors.New("not a whole export of the audit")

// maxExportLine bounds a line: a record of the longest kind, as base64 and as
// what people read of it.
const maxExportLine = 8 * maxRecord

// VerifyExport checks an export: each event's hash, its link to the one before,
// that its readable part says what its record does, that all of it is there, and
// that the events in anchors are part of it. One that begins with a segment's
// first event is also folded, as it is when a ledger is loaded.
func VerifyExport(ctx context.Context, r io.Reader, anchors ...Anchor) (VerifyReport, error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 64<<10), maxExportLine)
	var head exportHead
	if !lines.Scan() {
		return VerifyReport{}, errors.Join(fmt.Errorf("%w: it is empty", ErrNotExport), lines.Err())
	}
	if err := json.Unmarshal(lines.Bytes(), &head); err != nil || head.Format != exportFormat {
		return VerifyReport{}, fmt.Errorf("%w: its first line does not say that it is one", ErrNotExport)
	}
	if head.Version != exportVersion {
		return VerifyReport{}, fmt.Errorf("%w: its version is %d, and this program knows %d", ErrNotExport, head.Version, exportVersion)
	}
	c := newChain(anchors)
	err := c.exported(ctx, lines, bytes.Clone(lines.Bytes()))
	if err == nil {
		err = c.end()
	}
	return c.report(err)
}

func (c *chain) exported(ctx context.Context, lines *bufio.Scanner, head []byte) error {
	for lines.Scan() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		seq := c.last + 1
		if exactly(lines.Bytes(), exportEnd{uint64(c.events), c.last, c.hash}) {
			if lines.Scan() {
				return fmt.Errorf("%w: something follows its end", ErrNotExport)
			}
			return lines.Err()
		}
		var line struct {
			Seq    uint64 `json:"seq"`
			Record []byte `json:"record"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil || len(line.Record) == 0 {
			return fmt.Errorf("%w: its line %d is neither event %d nor its end", ErrNotExport, c.events+2, seq)
		}
		if c.events == 0 {
			if kind := typeOf(line.Record); kind == LedgerCreated || kind == LedgerRotated {
				c.folder, c.layer = &folder{newInterner()}, newLayer(nil)
			}
		}
		e, hash, err := c.next(line.Record)
		if err != nil {
			return err
		}
		if c.events == 1 && !exactly(head, exportHead{exportFormat, exportVersion, e.Seq, e.Prev}) {
			return &ChainError{Seq: e.Seq, Problem: BrokenGap, Detail: "the export says that it begins with another event"}
		}
		v, err := e.public(hash)
		if err != nil {
			return &ChainError{Seq: e.Seq, Problem: BrokenUndecodable, Detail: err.Error()}
		}
		if !exactly(lines.Bytes(), exportLine{v, line.Record}) {
			return &ChainError{Seq: e.Seq, Problem: BrokenHash, Detail: "what is to be read of it is not what its record says"}
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("cannot read the export: %w", err)
	}
	return fmt.Errorf("%w: its end is missing, after event %d", ErrNotExport, c.last)
}

func typeOf(record []byte) EventType {
	var e entry
	if decodeEvent(record, &e) != nil {
		return ""
	}
	return e.Type
}

// exactly tells whether line is v as it is written.
func exactly(line []byte, v any) bool {
	b, err := json.Marshal(v)
	return err == nil && bytes.Equal(line, b)
}
