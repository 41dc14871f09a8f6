package wire

import (
	"bytes"
	"encoding/json"
	"net/http"
	"testing"
	"unicode/utf8"
)

// FuzzMountRequest: what is taken says the same once it is written again.
func FuzzMountRequest(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		var first, second MountRequest
		if DecodeStrict(b, &first) != nil || first.Check() != nil {
			return
		}
		again, err := json.Marshal(first)
		if err != nil {
			t.Fatal(err)
		}
		if err := DecodeStrict(again, &second); err != nil || first != second {
			t.Fatalf("%+v became %+v: %v", first, second, err)
		}
	})
}

// FuzzReply: whatever a guest sends is bounded, and what it says is printable.
func FuzzReply(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		request, err := newRequest(http.MethodGet, "/v1/mounts", nil)
		if err != nil {
			t.Fatal(err)
		}
		r := &counted{r: bytes.NewReader(b)}
		status, body, err := readReply(r, request)
		if r.n > 2*(MaxBody+MaxHeader) {
			t.Fatalf("read %d bytes", r.n)
		}
		if err != nil {
			return
		}
		if len(body) > MaxBody {
			t.Fatalf("a body of %d bytes", len(body))
		}
		var list MountList
		if err := decodeReply(status, body, &list); err != nil {
			if s := err.Error(); len(s) > 600 || !utf8.ValidString(s) || s != Printable(s, 600) {
				t.Fatalf("error is not printable: %q", s)
			}
		}
	})
}

type counted struct {
	r *bytes.Reader
	n int
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += n
	return n, err
}
