package wire

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	// Port is the vsock port on which an agent listens.
	Port = 220
	// GuestPort is the vsock port on which the broker serves a guest.
	GuestPort = 219
	// MaxBody bounds the body of a request and of an answer, in bytes.
	MaxBody = 64 << 10
	// MaxHeader bounds an answer's status line and headers, in bytes.
	MaxHeader = 8 << 10
	// MountRoot is the directory under which an agent mounts grants.
	MountRoot = "/run/spectrum/fs"
)

// Reasons why a request is refused before it is sent, or by the agent that
// receives it.
var (
	ErrLabel   = errors.New("label is not [a-z0-9][a-z0-9._-]{0,62}")
	ErrTag     = errors.New("tag is not 1 to 36 letters, digits, '-', '_' or '.'")
	ErrFile    = errors.New("file is not one name of at most 255 bytes without '/' or NUL")
	ErrTimeout = errors.New("timeout_ms is not between 1 and 600000")
)

// Health is an agent's answer to GET /v1/health.
type Health struct {
	Agent   string `json:"agent"`
	Version string `json:"version"`
	Role    string `json:"role"`
	BootID  string `json:"boot_id"`
}

// MountRequest is the body of POST /v1/mounts.
type MountRequest struct {
	// Tag of the virtio-fs device; at most 36 bytes, as the device has no more.
	Tag string `json:"tag"`
	// Label names the directory beneath [MountRoot].
	Label string `json:"label"`
	// ReadOnly mounts it read-only. The host enforces it either way.
	ReadOnly bool `json:"read_only"`
	// File is the single entry of a one-file grant, or empty.
	File string `json:"file"`
	// TimeoutMS is how long to wait for the device to appear.
	TimeoutMS int `json:"timeout_ms"`
}

// MountReply answers POST /v1/mounts.
type MountReply struct {
	Path string `json:"path"`
}

// Mount is one row of GET /v1/mounts.
type Mount struct {
	Label    string `json:"label"`
	Tag      string `json:"tag"`
	Path     string `json:"path"`
	ReadOnly bool   `json:"read_only"`
	File     string `json:"file"`
}

// MountList answers GET /v1/mounts.
type MountList struct {
	Mounts []Mount `json:"mounts"`
}

// Code classifies an agent's refusal.
type Code string

// The codes an agent uses, with the status each is sent with.
const (
	CodeBadRequest Code = "bad_request" // 400
	CodeNotFound   Code = "not_found"   // 404
	CodeConflict   Code = "conflict"    // 409: the label is mounted from another tag
	CodeTimeout    Code = "timeout"     // 504: the device did not appear in time
	CodeBusy       Code = "busy"        // 503: too much is under way
	CodeFailed     Code = "failed"      // 500
)

// ErrorReply is the body of every answer that is not 2xx.
type ErrorReply struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
}

var (
	labelPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	tagPattern   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,35}$`)
)

// CheckLabel says whether s can name a mount.
func CheckLabel(s string) error {
	if !labelPattern.MatchString(s) {
		return ErrLabel
	}
	return nil
}

// MountPath is where the mount called label is.
func MountPath(label string) string { return MountRoot + "/" + label }

// Check says why an agent must refuse r.
func (r MountRequest) Check() error {
	if err := CheckLabel(r.Label); err != nil {
		return err
	}
	if !tagPattern.MatchString(r.Tag) {
		return ErrTag
	}
	if err := checkFile(r.File); err != nil {
		return err
	}
	if r.TimeoutMS < 1 || r.TimeoutMS > 600_000 {
		return ErrTimeout
	}
	return nil
}

// Timeout is TimeoutMS as a duration.
func (r MountRequest) Timeout() time.Duration {
	return time.Duration(r.TimeoutMS) * time.Millisecond
}

func checkFile(name string) error {
	if name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
		return ErrFile
	}
	return nil
}

func (m Mount) check() error {
	if err := CheckLabel(m.Label); err != nil {
		return err
	}
	if !tagPattern.MatchString(m.Tag) {
		return ErrTag
	}
	if err := checkFile(m.File); err != nil {
		return err
	}
	if m.Path != MountPath(m.Label) {
		return fmt.Errorf("path of %s is not %s", m.Label, MountPath(m.Label))
	}
	return nil
}

func (h Health) check() error {
	for name, v := range map[string]string{"agent": h.Agent, "version": h.Version, "role": h.Role, "boot_id": h.BootID} {
		if v != Printable(v, 64) {
			return fmt.Errorf("%s is too long or not printable", name)
		}
	}
	if h.Agent == "" {
		return errors.New("agent is empty")
	}
	return nil
}

// Printable returns at most limit bytes of s with everything that is not
// plainly printable replaced, so that a guest's words can be shown.
func Printable(s string, limit int) string {
	var b strings.Builder
	for _, r := range s {
		if !unicode.IsPrint(r) {
			r = utf8.RuneError
		}
		if b.Len()+utf8.RuneLen(r) > limit {
			break
		}
		b.WriteRune(r)
	}
	return b.String()
}
