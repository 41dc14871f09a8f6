package policy

import (
	"bytes"
	"errors"
	"io"
	"path/filepath"
	"testing"
)

func TestFrameBounds(t *testing.T) {
	long := appendFrame(nil, frame{op: opDecide, payload: make([]byte, 100)})
	if _, err := readFrame(bytes.NewReader(long), 99); !errors.Is(err, errFrameTooLong) {
		t.Errorf("too long: %v", err)
	}
	if _, err := readFrame(bytes.NewReader(long[:50]), 100); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut short: %v", err)
	}
	if _, err := readFrame(bytes.NewReader(nil), 100); !errors.Is(err, io.EOF) {
		t.Errorf("end between frames: %v", err)
	}
	if _, err := readFrame(bytes.NewReader(appendFrame(nil, frame{op: opEnd})), 100); !errors.Is(err, errFrameOp) {
		t.Errorf("unknown op: %v", err)
	}
	// A header that claims much and sends little costs little.
	claim := appendFrame(nil, frame{op: opLoad, payload: nil})
	copy(claim[5:], []byte{0x00, 0xff, 0xff, 0xff})
	allocated := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = readFrame(bytes.NewReader(claim), maxRequest)
		}
	}).AllocedBytesPerOp()
	if allocated > 64<<10 {
		t.Errorf("%d bytes allocated for an empty claim", allocated)
	}
}

func FuzzFrame(f *testing.F) {
	seeds, err := filepath.Glob("testdata/fuzz/FuzzFrame/*")
	if err != nil || len(seeds) == 0 {
		f.Fatal("the committed corpus is missing")
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := readFrame(bytes.NewReader(data), 1<<16)
		if err != nil {
			return
		}
		wire := appendFrame(nil, got)
		if !bytes.Equal(wire, data[:len(wire)]) {
			t.Fatalf("read %x, wrote %x", data, wire)
		}
	})
}

// FuzzReply is the broker's side: whatever a worker answers is an answer or an
// error, and never an allow that the bytes do not spell out.
func FuzzReply(f *testing.F) {
	seeds, err := filepath.Glob("testdata/fuzz/FuzzReply/*")
	if err != nil || len(seeds) == 0 {
		f.Fatal("the committed corpus is missing")
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var d decision
		if err := decodeReply(data, &d); err != nil {
			return
		}
		a := Answer{Concerned: true}
		a.set(d)
		if a.Outcome == Allow && !bytes.Contains(bytes.ToLower(data), []byte("true")) {
			t.Fatalf("%s allowed", data)
		}
	})
}
