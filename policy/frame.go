package policy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The wire between the broker and a worker is a sequence of frames over two
// pipes, each answered by exactly one: an op, the number of the request, the
// length of the payload, and the payload, which is JSON. A reply repeats op and
// number. Both ends bound the length before they read.
type op byte

const (
	opConfine op = iota + 1 // sandboxConfig → confinement; always the first
	opLoad                  // Sources → loadReply
	opDecide                // Input → decision
	opExplain               // Input → decision with reasons
	opCheck                 // Sources → []Finding
	opTest                  // testRequest → TestReport
	opEnd                   // one past the last
)

// opRetire is set in a reply's op when the worker has used up enough of its
// CPU allowance that it should be replaced.
const opRetire op = 0x80

const (
	headerSize = 9
	maxRequest = 16 << 20
	maxReply   = 4 << 20
)

var (
	errFrameTooLong = errors.New("frame is too long")
	errFrameOp      = errors.New("frame has an unknown op")
)

type frame struct {
	op      op
	seq     uint32
	payload []byte
}

// appendFrame appends f's wire form to buf.
func appendFrame(buf []byte, f frame) []byte {
	buf = append(buf, byte(f.op))
	buf = binary.BigEndian.AppendUint32(buf, f.seq)
	buf = binary.BigEndian.AppendUint32(buf, uint32(len(f.payload)))
	return append(buf, f.payload...)
}

// readFrame reads one frame with a payload of at most limit bytes. The end of
// the stream between frames is io.EOF, within one io.ErrUnexpectedEOF. Memory
// grows with what arrives, not with what a header claims.
func readFrame(r io.Reader, limit uint32) (frame, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return frame{}, err
	}
	f := frame{op: op(header[0]), seq: binary.BigEndian.Uint32(header[1:5])}
	if kind := f.op &^ opRetire; kind < opConfine || kind >= opEnd {
		return frame{}, fmt.Errorf("%w: %d", errFrameOp, f.op)
	}
	n := binary.BigEndian.Uint32(header[5:9])
	if n > limit {
		return frame{}, fmt.Errorf("%w: %d bytes, %d are allowed", errFrameTooLong, n, limit)
	}
	const trusted = 64 << 10
	if n <= trusted {
		f.payload = make([]byte, n)
		if _, err := io.ReadFull(r, f.payload); err != nil {
			return frame{}, unexpectedEOF(err)
		}
		return f, nil
	}
	var buf bytes.Buffer
	if _, err := io.CopyN(&buf, r, int64(n)); err != nil {
		return frame{}, unexpectedEOF(err)
	}
	f.payload = buf.Bytes()
	return f, nil
}

func unexpectedEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
