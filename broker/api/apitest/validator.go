// Package apitest holds traffic of the two APIs against their OpenAPI
// documents. It is for tests: of this module's packages, and of whole suites
// through Proxy.
//
// Its law: what a document does not describe is an error, in a response
// always, in a request whenever the server accepted it.
package apitest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"

	"spectrum-os.org/broker/broker/api"
)

// TB is what a Validator needs of a test.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Validator checks requests and responses against one document.
type Validator struct {
	t   TB
	doc *openapi3.T

	mu   sync.Mutex
	seen map[string]int
}

// New returns a validator of a document, which is itself checked.
func New(t TB, d api.Document) *Validator {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromData(d.YAML())
	if err == nil {
		err = doc.Validate(context.Background())
	}
	if err != nil {
		t.Fatalf("the OpenAPI document %s is invalid: %v", d, err)
	}
	return &Validator{t: t, doc: doc, seen: map[string]int{}}
}

// Doc returns the document.
func (v *Validator) Doc() *openapi3.T { return v.doc }

// Seen returns how often each "operationId status" has passed.
func (v *Validator) Seen() map[string]int {
	v.mu.Lock()
	defer v.mu.Unlock()
	out := make(map[string]int, len(v.seen))
	for k, n := range v.seen {
		out[k] = n
	}
	return out
}

// operation finds the operation of a request, preferring a path without
// wildcards. It is nil for what the document does not know.
func (v *Validator) operation(r *http.Request) (*routers.Route, map[string]string) {
	got := strings.Split(r.URL.EscapedPath(), "/")
	var best *routers.Route
	var params map[string]string
	for path, item := range v.doc.Paths.Map() {
		op := item.GetOperation(r.Method)
		if op == nil {
			continue
		}
		values, match := matchPath(strings.Split(path, "/"), got)
		if match && (best == nil || len(values) < len(params)) {
			best = &routers.Route{Spec: v.doc, Path: path, PathItem: item, Method: r.Method, Operation: op}
			params = values
		}
	}
	return best, params
}

func matchPath(want, got []string) (map[string]string, bool) {
	values := map[string]string{}
	if len(want) != len(got) {
		return nil, false
	}
	for i, w := range want {
		s, err := url.PathUnescape(got[i])
		switch {
		case err != nil:
			return nil, false
		case strings.HasPrefix(w, "{") && s != "":
			values[strings.Trim(w, "{}")] = s
		case s != w:
			return nil, false
		}
	}
	return values, true
}

// CheckRequest says what of a request the document does not describe.
func (v *Validator) CheckRequest(r *http.Request, body []byte) error {
	route, params := v.operation(r)
	if route == nil {
		return fmt.Errorf("%s %s is not in the document", r.Method, r.URL.EscapedPath())
	}
	for name := range r.URL.Query() {
		if route.Operation.Parameters.GetByInAndName("query", name) == nil {
			return fmt.Errorf("query parameter %s is not in the document", name)
		}
	}
	if len(body) > 0 && route.Operation.RequestBody == nil {
		return errors.New("the document describes no body here")
	}
	clone := r.Clone(r.Context())
	clone.Body = io.NopCloser(bytes.NewReader(body))
	clone.ContentLength = int64(len(body))
	return openapi3filter.ValidateRequest(r.Context(), &openapi3filter.RequestValidationInput{
		Request: clone, PathParams: params, Route: route,
	})
}

// CheckResponse says what of a response the document does not describe. The
// body of an upgrade is not looked at.
func (v *Validator) CheckResponse(r *http.Request, status int, h http.Header, body []byte) error {
	route, _ := v.operation(r)
	if route == nil {
		// An unknown route or method: a problem document all the same.
		if status != http.StatusNotFound && status != http.StatusMethodNotAllowed && status != http.StatusTooManyRequests && status != http.StatusRequestEntityTooLarge && status != http.StatusBadRequest {
			return fmt.Errorf("status %d for a route that is not in the document", status)
		}
		return v.checkContent("application/problem+json", h, body, v.doc.Components.Schemas["Problem"])
	}
	ref := route.Operation.Responses.Status(status)
	if ref == nil {
		if status < 400 {
			return fmt.Errorf("%s answered %d, which is not in the document", route.Operation.OperationID, status)
		}
		if ref = route.Operation.Responses.Default(); ref == nil {
			return fmt.Errorf("%s has no default response", route.Operation.OperationID)
		}
	}
	if len(ref.Value.Content) == 0 {
		if len(body) > 0 && status != http.StatusSwitchingProtocols {
			return fmt.Errorf("%s answered %d with a body", route.Operation.OperationID, status)
		}
		return nil
	}
	for media, content := range ref.Value.Content {
		if err := v.checkContent(media, h, body, content.Schema); err != nil {
			return fmt.Errorf("%s answered %d: %w", route.Operation.OperationID, status, err)
		}
	}
	return nil
}

func (v *Validator) checkContent(media string, h http.Header, body []byte, schema *openapi3.SchemaRef) error {
	got, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil || got != media {
		return fmt.Errorf("the media type is %q, not %s", h.Get("Content-Type"), media)
	}
	switch media {
	case "text/plain":
		return nil
	case "application/x-ndjson":
		sc := bufio.NewScanner(bytes.NewReader(body))
		sc.Buffer(nil, 16<<20)
		for sc.Scan() {
			if err := visit(sc.Bytes(), schema); err != nil {
				return err
			}
		}
		return sc.Err()
	}
	return visit(body, schema)
}

func visit(b []byte, schema *openapi3.SchemaRef) error {
	var value any
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if err := dec.Decode(&value); err != nil {
		return fmt.Errorf("the body is not JSON: %w", err)
	}
	if dec.More() {
		return errors.New("the body is more than one value")
	}
	return schema.Value.VisitJSON(value, openapi3.VisitAsResponse(), openapi3.MultiErrors())
}

// check reports what is wrong with one exchange to the test.
func (v *Validator) check(r *http.Request, reqBody []byte, status int, h http.Header, body []byte) {
	v.t.Helper()
	if err := v.CheckResponse(r, status, h, body); err != nil {
		v.t.Errorf("response to %s %s is not as documented: %v\n%s", r.Method, r.URL, err, body)
	}
	if status < 300 {
		if err := v.CheckRequest(r, reqBody); err != nil {
			v.t.Errorf("accepted request %s %s is not as documented: %v\n%s", r.Method, r.URL, err, reqBody)
		}
	}
	if route, _ := v.operation(r); route != nil {
		v.mu.Lock()
		v.seen[fmt.Sprintf("%s %d", route.Operation.OperationID, status)]++
		v.mu.Unlock()
	}
}

// Wrap returns a handler that checks all that passes through h. Streams and
// upgrades work as they do without it.
func (v *Validator) Wrap(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		in := &tee{rc: r.Body}
		if r.Body != nil && r.Body != http.NoBody {
			r.Body = in
		}
		orig := r.Clone(r.Context())
		rec := &recorder{ResponseWriter: w}
		aborted := true
		defer func() {
			if rec.status == 0 && !rec.hijacked {
				if aborted {
					return
				}
				rec.status = http.StatusOK
			}
			if aborted { // the last line of a stream may be half a one
				rec.body.Truncate(bytes.LastIndexByte(rec.body.Bytes(), '\n') + 1)
			}
			if rec.hijacked {
				rec.status = http.StatusSwitchingProtocols
			}
			v.check(orig, in.buf.Bytes(), rec.status, w.Header(), rec.body.Bytes())
		}()
		h.ServeHTTP(rec, r)
		aborted = false
	})
}

type tee struct {
	rc  io.ReadCloser
	buf bytes.Buffer
}

func (t *tee) Read(b []byte) (int, error) {
	n, err := t.rc.Read(b)
	t.buf.Write(b[:n])
	return n, err
}

func (t *tee) Close() error { return t.rc.Close() }

type recorder struct {
	http.ResponseWriter
	status   int
	hijacked bool
	body     bytes.Buffer
}

func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 && status >= 200 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(b)
	r.body.Write(b[:n])
	return n, err
}

func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(r.ResponseWriter).Hijack()
	r.hijacked = err == nil
	return c, rw, err
}
