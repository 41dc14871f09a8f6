package api

import (
	_ "embed"
)

//go:embed openapi/host.yaml
var hostYAML []byte

//go:embed openapi/guest.yaml
var guestYAML []byte

// Document is one of the two OpenAPI documents.
type Document string

// The documents.
const (
	HostDocument  Document = "host"
	GuestDocument Document = "guest"
)

// YAML returns the document's text, or nil if there is no such document.
func (d Document) YAML() []byte {
	switch d {
	case HostDocument:
		return append([]byte(nil), hostYAML...)
	case GuestDocument:
		return append([]byte(nil), guestYAML...)
	}
	return nil
}
