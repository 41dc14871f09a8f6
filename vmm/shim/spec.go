package shim

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/google/uuid"
)

func (s *Spec) check() error {
	switch {
	case s.VM == uuid.Nil:
		return errors.New("the spec names no VM")
	case !filepath.IsAbs(s.RuntimeDir), !filepath.IsAbs(s.VMM), !filepath.IsAbs(s.Virtiofsd):
		return errors.New("a path in the spec is not absolute")
	case s.MemoryMiB < 1 || s.MemoryMiB > 1<<20:
		return fmt.Errorf("memory of %d MiB is out of range", s.MemoryMiB)
	case s.VCPUs < 1 || s.VCPUs > 254:
		return fmt.Errorf("%d virtual CPUs are out of range", s.VCPUs)
	case s.Segments < 0 || s.Segments > maxSegments:
		return fmt.Errorf("%d PCI segments are more than %d", s.Segments, maxSegments)
	case s.CutDeadline < 0 || s.Stretch < 0:
		return errors.New("a negative time")
	case len(s.Disks) > 16:
		return fmt.Errorf("%d disks are more than 16", len(s.Disks))
	}
	return nil
}

// fill puts the defaults in.
func (s *Spec) fill() {
	if s.Segments == 0 {
		s.Segments = DefaultSegments
	}
	if s.CutDeadline == 0 {
		s.CutDeadline = DefaultCutDeadline
	}
	if s.Stretch == 0 {
		s.Stretch = 1
	}
}

// stretch is d on this machine.
func (s *Spec) stretch(d time.Duration) time.Duration {
	return time.Duration(float64(d) * s.Stretch)
}
