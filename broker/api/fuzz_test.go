package api_test

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/broker/api/apitest"
)

// fuzzDecoder holds a decoder to three things: it never panics; what it takes
// is what the document describes; and what it made of it, encoded and decoded
// again, is the same.
func fuzzDecoder[T any](f *testing.F, d api.Document, decode func([]byte) (T, error)) {
	name := reflect.TypeFor[T]().Name()
	needCorpus(f)
	schema := apitest.New(f, d).Doc().Components.Schemas[name]
	f.Fuzz(func(t *testing.T, body []byte) {
		v, err := decode(body)
		if err != nil {
			if api.CodeOf(err) != api.CodeInvalid || len(err.Error()) > 1024 {
				t.Errorf("refused with %v", err)
			}
			return
		}
		var generic any
		if err := json.Unmarshal(body, &generic); err != nil {
			t.Fatalf("took what is not JSON: %v", err)
		}
		if err := schema.Value.VisitJSON(generic, openapi3.VisitAsRequest()); err != nil {
			t.Errorf("took what the document does not describe: %v", err)
		}
		again, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		w, err := decode(again)
		if err != nil || !reflect.DeepEqual(v, w) {
			t.Errorf("%s became %s: %+v, %v", body, again, w, err)
		}
	})
}

// needCorpus fails when the committed inputs are missing.
func needCorpus(f *testing.F) {
	f.Helper()
	if found, _ := filepath.Glob(filepath.Join("testdata", "fuzz", f.Name(), "*")); len(found) == 0 {
		f.Fatalf("testdata/fuzz/%s is empty", f.Name())
	}
}

func FuzzGrantRequest(f *testing.F)   { fuzzDecoder(f, api.HostDocument, api.DecodeGrant) }
func FuzzRevokeRequest(f *testing.F)  { fuzzDecoder(f, api.HostDocument, api.DecodeRevoke) }
func FuzzStopRequest(f *testing.F)    { fuzzDecoder(f, api.HostDocument, api.DecodeStop) }
func FuzzSetNameRequest(f *testing.F) { fuzzDecoder(f, api.HostDocument, api.DecodeSetName) }
func FuzzGuestRequest(f *testing.F)   { fuzzDecoder(f, api.GuestDocument, api.DecodeGuest) }
func FuzzDropRequest(f *testing.F)    { fuzzDecoder(f, api.GuestDocument, api.DecodeDrop) }
func FuzzGuestDelegation(f *testing.F) {
	fuzzDecoder(f, api.GuestDocument, api.DecodeDelegation)
}

// FuzzGuestHTTP throws whole requests at the guest API: whatever comes, the
// answer is as documented and is not the broker's failure.
func FuzzGuestHTTP(f *testing.F) {
	needCorpus(f)
	v := apitest.New(f, api.GuestDocument)
	f.Fuzz(func(t *testing.T, method, path string, body []byte) {
		r, err := http.NewRequestWithContext(t.Context(), method, "http://broker", strings.NewReader(string(body)))
		if err != nil {
			return
		}
		if r.URL, err = r.URL.Parse(path); err != nil {
			return
		}
		r.Header.Set("Content-Type", "application/json")
		rec := &memory{h: http.Header{}}
		api.NewGuestHandler(guestFake{newFake()}, mailVM, api.GuestOptions{}).ServeHTTP(rec, r)
		if rec.status >= 500 || rec.status < 200 {
			t.Fatalf("%s %s answers %d %s", method, path, rec.status, rec.body.String())
		}
		if err := v.CheckResponse(r, rec.status, rec.h, rec.body.Bytes()); err != nil {
			t.Errorf("%s %s: %v", method, path, err)
		}
	})
}

// The committed corpora hold at least one input that is taken and one that is
// not, or they would try nothing.
func TestCorpora(t *testing.T) {
	for name, decode := range map[string]func([]byte) error{
		"FuzzGrantRequest":   func(b []byte) error { _, err := api.DecodeGrant(b); return err },
		"FuzzRevokeRequest":  func(b []byte) error { _, err := api.DecodeRevoke(b); return err },
		"FuzzStopRequest":    func(b []byte) error { _, err := api.DecodeStop(b); return err },
		"FuzzSetNameRequest": func(b []byte) error { _, err := api.DecodeSetName(b); return err },
		"FuzzGuestRequest":   func(b []byte) error { _, err := api.DecodeGuest(b); return err },
		"FuzzDropRequest":    func(b []byte) error { _, err := api.DecodeDrop(b); return err },

		"FuzzGuestDelegation": func(b []byte) error { _, err := api.DecodeDelegation(b); return err },
	} {
		files, _ := filepath.Glob(filepath.Join("testdata", "fuzz", name, "*"))
		taken, refused := 0, 0
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if decode(corpusBytes(t, b)) == nil {
				taken++
			} else {
				refused++
			}
		}
		if taken == 0 || refused == 0 {
			t.Errorf("%s: %d are taken, %d refused", name, taken, refused)
		}
	}
}

// corpusBytes reads the single []byte of a corpus file.
func corpusBytes(t *testing.T, file []byte) []byte {
	t.Helper()
	_, quoted, found := strings.Cut(string(file), "[]byte(")
	s, err := strconv.Unquote(strings.TrimSuffix(strings.TrimSpace(quoted), ")"))
	if !found || err != nil {
		t.Fatalf("not a corpus file: %q, %v", file, err)
	}
	return []byte(s)
}
